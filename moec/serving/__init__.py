"""An HTTP server with the interface of OpenAI: fields, answers, the thread of the engine."""
