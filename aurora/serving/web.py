"""The verb `web`: a page on 127.0.0.1 that captions what is dropped on it.

Gradio draws it. It is mounted in a server of ours, because Gradio's own start calls itself over HTTP (which a proxy in
the environment breaks) and because what it serves beside the page is kept shut here: see `Gate`.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from aurora.config import load_config, register_schema
from aurora.data.bundled import MEDIA
from aurora.runtime import RuntimeConfig, set_threads
from aurora.serving.limits import Limits
from aurora.serving.listen import LOOPBACK, address_of, listen, run_server
from aurora.serving.web_runs import BUNDLED, Models

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_MESSAGE_BYTES = 2**20
"""Of a request that is no upload."""
_STORED_UPLOADS = 20
"""Largest uploads that may lie on the disk at once; each is deleted after an hour."""
_QUEUED_REDRAWS = 256
"""Maps that may wait to be drawn, of all visitors."""

_PAGES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
_FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", "/gradio_api/file=")
_CALLS = {
    f"/gradio_api/{call}"
    for call in ("info", "run/predict", "queue/join", "queue/data", "cancel", "reset", "upload", "upload_progress",
                 "app_id", "user", "startup-events", "theme.css", "login_check", "token")
}  # fmt: skip
# The page may neither load from nor send to anywhere else.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


@dataclass(kw_only=True, slots=True)
class WebConfig(RuntimeConfig):
    """Open a page that captions images and videos and shows what merged."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    model_path: str | None = None
    """Checkpoint folder or hub id that is chosen at first; null is the bundled aurora-tiny."""
    models: list[str] = field(default_factory=list)
    """More folders and hub ids to choose from."""
    any_model: bool | None = None
    """Let visitors name a folder of this machine or a hub id; null allows it where host is 127.0.0.1."""
    num_frm: int = 8
    """Frames sampled from a video, unless the visitor chooses."""
    limits: Limits = field(default_factory=Limits)
    """What one visitor may ask for."""

    def __post_init__(self) -> None:
        """Check ranges."""
        RuntimeConfig.__post_init__(self)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: want 0 to 65535")
        if self.num_frm < 1:
            raise ValueError(f"num_frm={self.num_frm}: want at least 1 frame")

    @property
    def visitors_name_models(self) -> bool:
        """Whether the chooser takes any folder or hub id."""
        return self.host in LOOPBACK if self.any_model is None else self.any_model


register_schema("web_schema", WebConfig)


class Gate:
    """ASGI middleware: what the page does not need is not served, and no request is larger than it has to be."""

    def __init__(self, app: Any, *, uploads: Path, max_stored_bytes: int) -> None:
        """Stand before an app.

        Args:
            app: The ASGI app.
            uploads: Folder of the uploads.
            max_stored_bytes: Uploads are refused while the folder holds more.
        """
        self.app, self.uploads, self.max_stored_bytes = app, uploads, max_stored_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(scope)
        if refusal is not None:
            from starlette.responses import PlainTextResponse

            await PlainTextResponse(refusal[1], refusal[0])(scope, receive, send)
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff"),
                           (b"referrer-policy", b"no-referrer")]  # fmt: skip
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, send_guarded)

    def refusal(self, scope: Any) -> tuple[int, str] | None:
        """Status and text for a request that is not served."""
        path = scope.get("path", "")
        known = path in _PAGES | _CALLS or path.startswith(_FOLDERS)
        # Gradio would fetch an address named here.
        if scope["type"] != "http" or not known or path.startswith("/gradio_api/file=http"):
            return 404, "not found"
        if scope["method"] != "POST":
            return None
        if path == "/gradio_api/upload":
            stored = sum(file.stat().st_size for file in self.uploads.rglob("*") if file.is_file())
            return (507, "too many uploads are stored, try again later") if stored > self.max_stored_bytes else None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > MAX_MESSAGE_BYTES:
            return 413, f"want a content-length of at most {MAX_MESSAGE_BYTES}"
        return None


def make_app(config: WebConfig, models: Models, uploads: Path) -> FastAPI:
    """Build the page and what serves it.

    Args:
        config: Address and limits.
        models: What may be chosen.
        uploads: An empty folder for what visitors upload.

    Returns:
        An ASGI app.
    """
    # Read when Gradio is imported or the page is built.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(uploads)}
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from aurora.serving.web_page import Page
    from aurora.serving.web_view import CSS

    page = Page(models, config.limits, num_frames=config.num_frm)
    take = page.file.async_move_resource_to_block_cache

    async def take_own(url_or_file_path: str | Path | None) -> str | None:
        """Take uploads and bundled clips alone: Gradio would copy any file, and fetch any address, a client names."""
        named = url_or_file_path
        if named is not None and not any(
            Path(named).resolve().is_relative_to(own) for own in (uploads, MEDIA.resolve())
        ):
            raise ValueError("file: was not uploaded here")
        return await take(named)

    page.file.async_move_resource_to_block_cache = take_own  # type: ignore[method-assign]
    page.app.has_launched = True  # Gradio checks the paths that clients name from then on; mounting leaves it out
    # The page would wait for ever for an event that Gradio refused; `Page.begin` refuses runs in words, and earlier.
    page.app.queue(max_size=config.limits.max_waiting + _QUEUED_REDRAWS, api_open=False)
    server = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    if config.host in LOOPBACK:  # else a page elsewhere could reach this one under a name of its own
        server.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    max_upload_bytes = config.limits.max_upload_mb * 2**20
    server.add_middleware(Gate, uploads=uploads, max_stored_bytes=_STORED_UPLOADS * max_upload_bytes)
    plain = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")  # Gradio's are hard to read
    gr.mount_gradio_app(
        server, page.app, path="", server_name=config.host, server_port=config.port, footer_links=[],
        run_history=False, allowed_paths=[str(MEDIA.resolve())], max_file_size=max_upload_bytes, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False, theme=plain, css=CSS,
    )  # fmt: skip
    return server


def serve(config: WebConfig) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        config: Address, models and limits.

    Raises:
        ValueError: if gradio is not installed, the address is taken, or the model cannot be loaded.
    """
    for package in ("gradio", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"web: needs {package}; pip install 'aurora-captioner[web]'")
    set_threads(config.threads)
    listed = [BUNDLED if config.model_path is None else config.model_path, *config.models]
    models = Models(config, listed, any_model=config.visitors_name_models)
    with listen(config.host, config.port) as listener, tempfile.TemporaryDirectory(prefix="aurora-web-") as folder:
        models.load(models.path_of(models.choices[0], ""))
        app = make_app(config, models, Path(folder).resolve())
        print(f"Aurora on {address_of(listener, config.host)} (Ctrl-C ends it)", flush=True)
        run_server(app, listener)


@hydra.main(version_base="1.3", config_path="pkg://aurora.configs", config_name="web")
def main(raw: DictConfig) -> None:
    """Serve what the command line configures; called through `aurora.cli.run`."""
    serve(load_config(raw, WebConfig))
