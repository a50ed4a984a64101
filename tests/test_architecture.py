"""The shape of the tree is held to what ARCHITECTURE.md says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pilotfish"

LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        [
            {"errors"},
            {"core"},
            {"runs"},
            {"ledger", "texts", "models"},
            {"taps"},
            {"heads"},
            {"scores"},
            {"actions", "steering", "routing", "feedback"},
            {"discovery"},
            {"engines", "reports"},
            {"server", "litellm"},
            {"vllm"},
            {"cli"},
        ],
    )
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_WORDS = ("manual_seed(", "np.random.", "random.seed", ".cuda(", "pickle", "torch.load", "torch.save")
MAY_SEED = {"runs.py", "tiny.py"}
MAY_CATCH_ALL = {"engines", "server", "vllm"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def unit_of(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return "pilotfish" if parts[0] == "__init__" else parts[0]


def imported_units(text: str) -> set[str]:
    """Rooms of the package that a module imports anywhere, lazily or for types alone included."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(f"{node.module}.{node.names[0].name}" if node.module == "pilotfish" else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("pilotfish.")}


def wrong_imports(source: Path) -> list[str]:
    rank = {unit: index for index, layer in enumerate(LAYERS) for unit in layer}
    wrong = []
    for path in sorted(source.rglob("*.py")):
        unit = unit_of(path, source)
        if unit == "pilotfish":
            continue
        if unit not in rank:
            wrong.append(f"{unit} has no layer")
            continue
        wrong += [
            f"{path.relative_to(source)} imports {other}"
            for other in imported_units(path.read_text()) - {unit}
            if rank.get(other, len(LAYERS)) >= rank[unit]
        ]
    return wrong


def test_imports_point_down():
    assert wrong_imports(SOURCE) == []


def test_the_import_check_notices_an_upward_a_sideways_and_a_lazy_import(tmp_path):
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "bank.py").write_text("from pilotfish.engines import Request\n")
    (tmp_path / "texts.py").write_text("def f():\n    from pilotfish.models import Pair\n")
    (tmp_path / "utils.py").write_text("")
    found = wrong_imports(tmp_path)
    assert found == ["heads/bank.py imports engines", "texts.py imports models", "utils has no layer"]


def test_every_package_says_what_goes_in_and_what_comes_out():
    for package in sorted(SOURCE.glob("*/__init__.py")):
        first = (ast.get_docstring(ast.parse(package.read_text())) or "").split("\n")[0]
        assert " in" in first and "out" in first, f"{package}: the docstring begins with 'X in, Y out'"


def test_every_package_lists_its_public_names_sorted():
    for package in sorted(SOURCE.glob("*/__init__.py")):
        tree = ast.parse(package.read_text())
        listed = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        ]
        assert listed and list(listed[0]) == sorted(listed[0]), f"{package}: __all__ is there and sorted"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_keeps_its_budget_and_its_manners(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES, f"{path.name} is over {MAX_FILE_LINES} lines: split the noun"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path.name}: {node.name} is too long"
        if isinstance(node, ast.ExceptHandler) and unit_of(path, SOURCE) not in MAY_CATCH_ALL:
            assert getattr(node.type, "id", "bare") not in {"bare", "Exception", "BaseException"} or isinstance(
                node.type, ast.Tuple | ast.Attribute
            ), f"{path.name}:{node.lineno} catches everything"
    for word in FORBIDDEN_WORDS:
        if word in text:
            assert word == "manual_seed(" and path.name in MAY_SEED, f"{path.name} holds {word!r}"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HELP = (
    "import contextlib, io, pilotfish.cli\n"
    "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): pilotfish.cli.main(['--help'])"
)


@pytest.mark.parametrize(
    "statement", ["import pilotfish", "import pilotfish.texts, pilotfish.actions, pilotfish.reports"]
)
def test_light_imports_load_no_torch(statement):
    assert "torch" not in loaded_by(statement)


def test_help_loads_no_torch():
    code = f"import sys\n{HELP}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_torch_check_can_fail():
    assert "torch" in loaded_by("import pilotfish.taps")
