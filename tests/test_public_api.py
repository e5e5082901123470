"""The public names of the package: listed, documented, and imported on first use."""

import inspect
import subprocess
import sys

import pytest

import kvfuse


def test_dir_shows_the_public_names_alone():
    assert dir(kvfuse) == sorted([*kvfuse.__all__, "__version__"])
    assert {"CacheToCache", "Fuser", "KVFuseError", "make_fuser", "make_method", "register_method"} <= set(dir(kvfuse))


@pytest.mark.parametrize("name", kvfuse.__all__)
def test_every_public_name_is_there_and_documented(name):
    thing = getattr(kvfuse, name)
    assert thing.__name__ == name
    assert vars(thing)["__doc__"] if inspect.isclass(thing) else thing.__doc__  # a class's own, not its base's


def test_every_error_is_public():
    from kvfuse import errors

    named = {name for name, thing in vars(errors).items() if inspect.isclass(thing) and issubclass(thing, Exception)}
    assert named <= set(kvfuse.__all__)


def test_listing_the_names_loads_no_heavy_library():
    code = "import sys, kvfuse; dir(kvfuse); kvfuse.PairError; print({'torch', 'transformers'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
