"""The claims of the measurements: one claim for each page of docs/benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """`name` is the field of the records; `text` explains the columns and states the result.

    `by_case`: each case has its own columns, and therefore its own table.
    """

    name: str
    title: str
    text: str
    by_case: bool = False


CLAIMS = (
    Claim(
        "model",
        "A model beside other runtimes",
        "Prompts of 512 tokens are read, then tokens are written one by one. The model has the "
        "shape of Granite-3.0-1B-A400M with random weights (`benchmarks/models/granite.py`). "
        "Tokens per second are medians; `from` and `to` bound the middle half of all measurements; "
        "a ratio says how many times as long as moec a runtime takes. In the bf16 rows OpenVINO "
        "and ONNX Runtime run moec's own ONNX file in float32, llama.cpp a bf16 file.",
    ),
    Claim(
        "families",
        "Every MoE type of transformers",
        "A small config of each type, with random weights and all kinds of layers of the default "
        "one, compiled and verified in float32 from token ids alone, also where the model takes "
        "images or sounds. `text`: whether 40 greedy tokens, or those before an end token, are "
        "transformers' own, or are where its top-k takes the first of equal scores, as moec's does "
        "and torch's does not always. A note on rows that differ is of such models.",
    ),
    Claim(
        "operators",
        "Single operators of ATen",
        "Each operator with float32 that torch describes for its own tests (`op_db`), on up to two "
        "small samples of different kinds: captured, all passes, and the graph interpreted beside "
        "eager (`python -m tests.fuzz.operators --record FILE`). It has the worst outcome of its "
        "samples. Names are torch's, with the variant.",
    ),
    Claim(
        "llama-cpp",
        "GGUF files beside llama.cpp",
        "`exact` are the dequantised weights in float32. Both runtimes round rows to 8 bits, so "
        "each has a distance of its own to that model. A gap is how much it prefers one of the two "
        "tokens that first differ, in nats; `KL` is the mean over rows of logits. `mx` is SmolLM2 "
        "as a Mixtral (`benchmarks/models/mixtral.py`), quantised by llama.cpp. Tokens a second "
        "are as in [the first page](model.md).",
        by_case=True,
    ),
    Claim(
        "serving",
        "Serving beside llama.cpp's server",
        "Clients that each wait for their answer; the model of [the first page](model.md). Seconds "
        "to the first token; `ratio` is moec's tokens a second over llama.cpp's.",
        by_case=True,
    ),
    Claim(
        "layer-bf16",
        "One MoE layer in bf16",
        "Milliseconds a call, medians. `eager`, `grouped_mm` and `batched_mm` are implementations "
        "of experts in transformers, `inductor` is `grouped_mm` through torch.compile. `ratio` is "
        "the time of the fastest other contender over moec's; `% of limit` compares moec with the "
        "machine's measured arithmetic peak or memory bandwidth, whichever binds. More than 100 % "
        "means that weights came from a cache.",
    ),
    Claim(
        "layer-f32",
        "One MoE layer in float32",
        "As for one layer in bf16. `MoE op` is ONNX Runtime's com.microsoft.MoE, `ONNX rows` is "
        "moec's export with one product per expert, both run by ONNX Runtime.",
    ),
    Claim(
        "layer-quantised",
        "One MoE layer with quantised experts",
        "Milliseconds a call, beside moec's bf16 layer and ONNX Runtime's com.microsoft.QMoE with "
        "the same codes. The share is that of the measured memory bandwidth. The three errors are "
        "those of moec quantised, moec bf16 and QMoE against eager in float32, as shares of the "
        "norm. On the Xeon with AMX, int4:32 takes longer than bf16 for 512 tokens.",
    ),
    Claim(
        "torch-compile",
        "A layer through torch.compile",
        "Milliseconds a call of a layer of OLMoE. `moec` is the whole layer by the backend, "
        "`moec-eager` the same with `options={'rest': 'eager'}`, `artifact` the layer compiled by "
        "`moec.compile`, `inductor` PyTorch's own compiler on transformers' experts.",
    ),
    Claim(
        "torch-compile-training",
        "A layer trained through torch.compile",
        "Milliseconds a forward and a backward pass of a layer of OLMoE, every gradient wanted, "
        "no optimiser step.",
    ),
    Claim(
        "onnx-files",
        "ONNX files in ONNX Runtime",
        "Milliseconds a call of one OLMoE layer's model; `transformers` is the file that "
        "transformers exports with onnxscript, the others are moec's.",
    ),
    Claim(
        "zero-experts",
        "Experts without a network (MoE++)",
        "Time of the experts relative to a vanilla MoE layer with the same experts, both compiled "
        "by moec, for the shapes of table 2 of arXiv 2410.07348. `paper` follows from its table 3; "
        "`theory` is the share of choices that fall on experts with networks.",
    ),
    Claim(
        "compressed-kernels",
        "Compressed experts: one product",
        "Microseconds of one matrix-vector product with weights that are not in a cache, beside "
        "bf16. `ternary` is QMoE's format, `2bit` one that moec had.",
    ),
    Claim(
        "compressed-model",
        "Compressed experts: whole models",
        "Milliseconds of a Switch transformer on one text, compiled with ternary experts and in "
        "bf16, medians. The paper reports a `ratio` below 1.05 next to an estimate of bf16 in "
        "which all experts share one weight; here each expert has its own.",
    ),
    Claim(
        "compressed-models",
        "Compressed experts: what trained models lose",
        "Perplexity on text that the model never saw. `left` is the loss as a share of that of "
        "rounding to nearest. QMoE (arXiv 2310.16795, table 4) reports about a tenth.",
    ),
    Claim(
        "compressed-parts",
        "Compressed experts: what each part of the fit does",
        "Variants that were tried on held-out files other than those above.",
    ),
    Claim(
        "perplexity",
        "Quantised experts: perplexity of tiny_moe",
        "Held-out text; `calibrated` chooses codes by GPTQ.",
    ),
    Claim(
        "allocations",
        "Bits of experts: what moec optimize chooses, beside other choices",
        "`asked` and `bits` are a weight of the experts; all else stays in floats. Codes are by "
        "GPTQ where a row does not say `nearest`. `more nats` and `more KL` are a held-out token's "
        "loss and divergence beyond those of the first row, with the standard error of the "
        "difference (windows are paired), and a star beyond two of them. Uniform formats are those "
        "next to what is asked, of at most and of at least as many bytes. `frequency` gives bits "
        "by how often experts are chosen, `random` to any.",
        by_case=True,
    ),
    Claim(
        "approximate-passes",
        "Pruned, merged and averaged experts",
        "Megabytes and perplexity with a share of the experts left; the kl columns ask for 50 % "
        "within a budget of KL divergence 0.1.\n\n"
        "![Perplexity against memory, by method](images/curves.png)",
    ),
    Claim(
        "refactor-dense",
        "A dense model as experts for domains",
        "Shares of the parameters that are active for a token; perplexity by domain; the share of "
        "tokens that the router sends to the experts of their domain.",
    ),
    Claim(
        "row-bits",
        "Activations of 8 and of 16 bits",
        "Quantised experts round their input rows to 8 bits, with `:rows16` to 16. Rows of 16 bits "
        "take up to twice as long where rows multiply. For int8 they halve the error; for int4 "
        "they gain nothing.",
        by_case=True,
    ),
    Claim(
        "contention",
        "Decode beside busy processes",
        "Tokens a second of a model of bf16 experts, by moec's pool of threads and by TVM's, which "
        "ran every loop before. `fair` is the share of the machine that moec's threads get where "
        "all threads get the same; `kept` is the tokens a second over `fair` times those of the "
        "faster pool beside no busy process.",
    ),
    Claim(
        "larger-than-memory",
        "A model larger than memory",
        "OLMoE's shape with 10 layers in bf16, 8.8 GB, 8.05 of them experts, with random weights "
        "whose routers prefer some experts; one text, tokens one by one. `store`: that share of "
        "each layer's experts in slots, reads past the page cache. `mapped`: the file is mapped, "
        "in a container whose limit is the memory that the store took, page cache included. GB are "
        "the peak of the process, with what it maps. Tokens a second are means, milliseconds "
        "medians. The machine has two speeds, from one process to the next: with all in memory a "
        "token takes 38 or 50 ms in either runtime; and its disk gave 1.0 to 2.6 GB/s.",
    ),
    Claim(
        "changes",
        "Single changes, before and after",
        "Artifacts of both commits run by turns on one machine.",
        by_case=True,
    ),
    Claim(
        "ewa",
        "Experts Weights Averaging",
        "A small vision transformer on handwritten digits, trained dense and with EWA "
        "(arXiv 2308.06093) for the same number of steps. EWA is ahead of dense training where "
        "nothing else regularises, and behind dense training with dropout.",
    ),
    Claim(
        "systems",
        "The twenty-four systems",
        "Milliseconds a call of a part of each system at its paper's size (`layer()` of its file "
        "in `examples/systems/`), in float32: medians of the rounds where the conditions say so, "
        "otherwise the least. `ratio` is the time of the fastest of eager and Inductor over "
        "moec's. Where the example evaluates every expert on every row, a sparse form runs beside "
        "it, and `dense ratio` is over the example's form alone.",
    ),
    Claim(
        "system-examples",
        "The examples of the twenty-four systems",
        "Seconds of each file of `examples/systems/` from start to end, on two cores and with an "
        "empty cache of compiled kernels; CPU seconds are the sum of its threads, MB the greatest "
        "resident memory.",
    ),
    Claim(
        "published-sizes",
        "The systems at their published sizes",
        "Whole models with random weights in float32, built and run. `published` is the paper's "
        "number, or that of the authors' code (MomentumSMoE, Mod-Squad); the names of MoE++ have "
        "one digit, which the counts round to. `error` is the greatest difference of the compiled "
        "model to eager, as a share of the greatest value.",
    ),
    Claim(
        "ranks-speedup",
        "Two ranks beside one process",
        "Two ranks with one thread each, over gloo, beside one process with one thread and with "
        "two. The model has 8 layers of the shape of Granite-3.0-1B-A400M, in bf16, and random "
        "weights; each rank has half of the experts and of the texts. No speed-up was measured: "
        "other work had both cores, so that two threads of one process were 0.80 to 1.41 times as "
        "fast as one. Ratios are of medians; `least` and `most` are of single rounds. CPU seconds "
        "of one process over those of the busiest rank, which other work changes less, are what "
        "two free cores could give at most.",
    ),
    Claim(
        "plan-traces",
        "Plans made from one half of recorded routing, for the other half",
        "Predicted milliseconds of a step of 4,096 tokens on eight devices with memory for 0.3 of "
        "the experts, of `examples/tiny_moe` and of SmolLM2 with experts "
        "(`benchmarks/models/upcycle.py`), on sources and docstrings of Python's standard library. "
        "`halves`: of windows of 128 tokens in random order, or in the order of the files, where "
        "the second half is of other files than the first. `drift` is the share of choices that "
        "changed, in the worst layer; `even routing` a plan that knows no trace. `busiest/mean` is "
        "of the busiest device in the worst layer, by the plan of a half and by that for even "
        "routing.",
    ),
    Claim(
        "einsum-moe",
        "A layer of einsums over places (DeepSpeed-MoE)",
        "Milliseconds a call by tokens, least of the rounds. `einsum` is the layer as written, on "
        "tensors over [S, E, C], `ratio` its time over moec's. The paper's 7.3 (arXiv 2201.05596, "
        "figure 11) is the same quotient of whole models on 128 and more GPUs.",
    ),
    Claim(
        "read-me-cache",
        "A cache of experts that knows the routes (Read-ME)",
        "Shares of uses that find their expert in a cache, replayed on the routes of a small "
        "trained model; table 4 of arXiv 2410.19123 has 34.19, 33.90 and 44.16 % for two of seven "
        "experts, 67.52, 66.95 and 77.21 % for four.",
    ),
)
