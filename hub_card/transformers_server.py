"""transformers' OpenAI-style server, with the code of the folder that it serves."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hub_files import read_config

_PACKAGES = ("fastapi", "uvicorn", "openai")


class FolderModel:
    """Stands for transformers' class of that name: loads the class that the folder's `auto_map` names.

    The server looks the architecture up in transformers, where newer versions have a class of their own and older ones
    none (serving_engines.md).
    """

    @staticmethod
    def from_pretrained(folder: str, **options: Any) -> Any:
        """`AutoModelForCausalLM.from_pretrained`, which follows `auto_map`; reports the class it found."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        print(f"serving {folder} with {type(model).__module__}.{type(model).__name__}", flush=True)
        return model


def answer_template_errors() -> None:
    """Make the server answer 400, with the reason, where messages are malformed or the chat template refuses them.

    transformers' server lets these exceptions pass, which becomes a 500 without a word.
    """
    import fastapi
    from fastapi.responses import JSONResponse
    from jinja2.exceptions import TemplateError
    from transformers.cli.serving import server, utils

    def refused(_request: fastapi.Request, error: TemplateError) -> JSONResponse:
        message = f"the messages cannot be made a prompt: {error}"
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=400)

    read = utils.BaseHandler.get_processor_inputs_from_messages

    def read_messages(messages: Any, modality: Any) -> Any:
        try:
            return read(messages, modality)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"a message or one of its tool_calls is malformed ({type(error).__name__}: {error})"
            raise TemplateError(reason) from error

    utils.BaseHandler.get_processor_inputs_from_messages = staticmethod(read_messages)
    build = server.build_server

    def build_server(*args: Any, **kwargs: Any) -> fastapi.FastAPI:
        app = build(*args, **kwargs)
        app.add_exception_handler(TemplateError, refused)
        return app

    server.build_server = build_server


def serve(folder: Path, options: Sequence[str] = ()) -> None:
    """Run `transformers serve` for `folder` until it is interrupted.

    The Python files of the folder are executed.

    Args:
        folder: exported with weights, tokenizer and chat template.
        options: further options of `transformers serve`, such as `["--port", "8001"]`.

    Raises:
        ValueError: if packages are missing, the folder is not one of this model's, or continuous batching is asked for.
    """
    if "--continuous-batching" in options:
        raise ValueError(
            "--continuous-batching keeps keys and values in pages, which cannot hold KDA states: leave it out"
        )
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'kimi-linear[serving]'")
    _, fields = read_config(Path(folder) / "config.json")
    if "auto_map" not in fields:
        raise ValueError(f"{folder} has no code of its own (no auto_map in config.json): export it first")
    import transformers
    from transformers.cli.transformers import app

    transformers.KimiLinearForCausalLM = FolderModel
    answer_template_errors()
    app(["serve", str(folder), "--trust-remote-code", *options])


__all__ = ["FolderModel", "serve"]
