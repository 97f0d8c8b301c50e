"""What importing the SDK brings in, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import dsclient
from dsclient import errors
from dswire.errors import DsError

#: an environment with nothing installed but what the SDK may need
_BARE = """
import sys

class Bare:
    allowed = {"dsclient", "dswire", "zmq", "msgpack", "msgspec"} | set(sys.stdlib_module_names)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.allowed:
            raise ModuleNotFoundError(f"{name} is not installed")

sys.meta_path.insert(0, Bare())
import dsclient
dsclient.Client
assert not {"structlog", "numpy", "torch", "uvloop", "click"} & set(sys.modules)
"""


def test_the_sdk_needs_pyzmq_msgpack_and_msgspec_only() -> None:
    subprocess.run([sys.executable, "-c", _BARE], check=True)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(dsclient, name) for name in dsclient.__all__)


def test_errors_are_the_houses_own_classes() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), DsError) or name == "ErrorInfo"
