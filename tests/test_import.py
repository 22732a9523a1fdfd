"""`import regard` and `regard --help` stay light."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "gguf", "pandas")


def loaded_after(code):
    """Heavy packages that are loaded in a fresh Python after `code`."""
    script = f"{code}\nimport sys\nprint('|'.join(n for n in {HEAVY!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def test_import_loads_nothing_heavy():
    assert loaded_after("import regard") == ""


def test_help_loads_nothing_heavy():
    help_only = (
        "import sys, regard.cli\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()) as shown:\n"
        "    assert regard.cli.main(['--help']) == 0\n"
        "assert 'inspect' in shown.getvalue()"
    )
    assert loaded_after(help_only) == ""


def test_every_public_name_resolves():
    import regard

    for name in regard.__all__:
        assert getattr(regard, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    import pytest

    import regard

    with pytest.raises(AttributeError, match="wotch"):
        _ = regard.wotch
