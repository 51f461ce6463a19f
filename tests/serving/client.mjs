// OpenAI's official client for JavaScript, against a server: node client.mjs URL, with the tests'
// answers as JSON on stdin. Its types are not checked at run time, so the fields are, here.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const OpenAI = createRequire(process.env.NODE_MODULES + "/")("openai").OpenAI;
const { model, prompt, text, chat, messages } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const greedy = { model, temperature: 0, max_tokens: 20 };

const completion = await client.completions.create({ prompt, ...greedy, logprobs: 2 });
assert.equal(completion.object, "text_completion");
assert.equal(completion.choices[0].text, text);
assert.equal(completion.choices[0].finish_reason, "length");
assert.equal(completion.choices[0].logprobs.tokens.join(""), text);
assert.equal(completion.usage.completion_tokens, 20);

const stream = await client.completions.create({
  prompt, ...greedy, stream: true, stream_options: { include_usage: true },
});
let streamed = "", usage;
for await (const chunk of stream) {
  if (chunk.choices.length) streamed += chunk.choices[0].text;
  else usage = chunk.usage;
}
assert.equal(streamed, text);
assert.equal(usage.completion_tokens, 20);

const answer = await client.chat.completions.create({ messages, ...greedy, logprobs: true });
assert.equal(answer.object, "chat.completion");
assert.deepEqual(answer.choices[0].message, { role: "assistant", content: chat, refusal: null });
assert.equal(answer.choices[0].logprobs.content.length, 20);

const runner = client.chat.completions.stream({ messages, ...greedy, n: 1 });
const roles = [];
runner.on("chunk", (chunk) => roles.push(chunk.choices[0]?.delta.role));
assert.equal((await runner.finalChatCompletion()).choices[0].message.content, chat);
assert.equal(roles[0], "assistant");

const leaving = await client.chat.completions.create({ messages, ...greedy, stream: true });
for await (const chunk of leaving) { leaving.controller.abort(); break; }

const models = await client.models.list();
assert.deepEqual(models.data.map((each) => each.id), [model]);
assert.equal((await client.models.retrieve(model)).owned_by, "moec");

await assert.rejects(client.completions.create({ prompt, model, suffix: "x" }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "suffix");
  return true;
});
await assert.rejects(client.completions.create({ prompt, model: "other" }), OpenAI.NotFoundError);
console.log("done");
