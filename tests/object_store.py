"""S3 on the loopback interface, in this process: it can be looked into, spoilt, and watched request by request."""

import json
import logging
import threading
from collections.abc import Callable
from hashlib import sha256
from urllib.parse import unquote

from moto import settings
from moto.backends import get_backend
from moto.s3 import models
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

SECRET = "secret/of+tests+0123456789"


class ObjectStore:
    """One bucket behind a server at a free port.

    Attributes:
        environment: where it is, and the keys that open it.
        requests: method and path of every request, as they come.
        watch: called with a request before it is handled and after; False before: it is not handled.
    """

    def __init__(self):
        S3FileSystem.clear_instance_cache()  # of one that was at another port
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        models.S3_UPLOAD_PART_MIN_SIZE = settings.S3_UPLOAD_PART_MIN_SIZE = 1
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._backend = get_backend("s3")["123456789012"]["aws"]
        self._backend.reset()  # of an earlier one in this process
        self._backend.create_bucket("bucket", "us-east-1")
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "key-of-tests",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.requests: list[str] = []
        self.watch: Callable[[str, str], bool] = lambda when, request: True

    def _answer(self, environ, start_response):
        request = f"{environ['REQUEST_METHOD']} {unquote(environ['PATH_INFO'])}?{environ['QUERY_STRING']}"
        self.requests.append(request)
        if not self.watch("before", request):
            start_response("403 Forbidden", [])
            return []
        answer = list(self._app(environ, start_response))
        self.watch("after", request)
        return answer

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def objects(self) -> dict[str, bytes]:
        """All that is whole in the bucket, by key."""
        return {key: found.value for key, found in self._backend.buckets["bucket"].keys.items()}

    def put(self, key: str, content: bytes) -> None:
        self._backend.put_object("bucket", key, content)

    def delete(self, key: str) -> None:
        self._backend.delete_object("bucket", key)

    def complete(self, run: str) -> dict[str, str]:
        """Hash of every complete name of a run folder; its content must be there and have it."""
        objects, found = self.objects, {}
        for key, text in objects.items():
            if key.startswith(f"{run}/complete/"):
                marker = json.loads(text)
                (content,) = (
                    value for place, value in objects.items() if place.startswith(f"{run}/objects/{marker['sha256']}/")
                )
                assert (len(content), sha256(content).hexdigest()) == (marker["size"], marker["sha256"]), key
                found[key.removeprefix(f"{run}/complete/")] = marker["sha256"]
        return found
