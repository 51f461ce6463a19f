"""Which extra to install for a missing package."""

from __future__ import annotations

EXTRAS = {
    "text": ("tokenizers", "jinja2"),
    "compile": ("torch", "networkx", "numba", "scipy", "sympy", "yaml"),
    "onnx": ("onnx", "onnxruntime"),
    "hf": ("transformers",),
    "chat": ("prompt_toolkit",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "guided": ("llguidance",),
    "sign": ("cryptography",),
    "gguf": ("gguf",),
    "bench": ("aiohttp", "matplotlib", "sklearn", "accelerate"),
}
NEEDED_FOR = {
    "text": "writing text",
    "compile": "compiling a model",
    "onnx": "ONNX files",
    "hf": "Hugging Face checkpoints",
    "gguf": "GGUF files",
    "chat": "a chat in a terminal",
    "serve": "a server",
    "guided": "a response_format",
    "sign": "a signature",
    "bench": "this benchmark",
}


def missing_extra(error: ModuleNotFoundError) -> str:
    """What to install, in one sentence; empty where the module belongs to no extra."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return (
                f"{NEEDED_FOR[extra]} needs {package}, which is not installed: "
                f"pip install 'moec[{extra}]'"
            )
    return ""
