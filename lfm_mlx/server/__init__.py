"""The HTTP server: OpenAI's and Anthropic's interfaces to one model; `python -m lfm_mlx.server`."""

from lfm_mlx.server.app import make_app
from lfm_mlx.server.model_service import Service
from lfm_mlx.server.serving import HttpServer, bind, check_certificate
from lfm_mlx.server.settings import ServerSettings

__all__ = ["HttpServer", "ServerSettings", "Service", "bind", "check_certificate", "make_app"]
