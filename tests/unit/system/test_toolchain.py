import resource
import subprocess

import pytest

from zi_experiments.system import toolchain


@pytest.mark.parametrize(
    "value",
    [
        "9.0",
        "10.0",
        "8.0;9.0",
        "8.0 9.0+PTX",
        " 8.6+PTX ; 9.0 ",
        "9.0a",
        "8.0;9.0a",
        "10.3a+PTX",
        "Hopper",
        "native",
        "90",
        "sm_90",
        "8.0,9.0",
        "9.",
    ],
)
def test_architectures_are_accepted_exactly_where_deepspeed_and_torch_read_them(monkeypatch, value):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    finding = toolchain.cuda_arch_list()

    assert (finding.fix is None) is is_read(value), finding.found
    assert value.strip() in finding.found


def is_read(value):
    """What happens when an operator is compiled, up to the flags of the compiler; no GPU is asked."""
    from deepspeed.ops.op_builder.quantizer import QuantizerBuilder
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    builder = QuantizerBuilder()
    builder.jit_mode, builder._jit_arch_list = True, value.strip()
    try:
        builder.compute_capability_args()  # it sets the variable for torch
        return bool(_get_cuda_arch_flags())
    except (ValueError, IndexError):
        return False


@pytest.mark.parametrize("value", [None, "", "  "])
def test_no_list_of_architectures_is_no_problem(monkeypatch, value):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)

    assert toolchain.cuda_arch_list().fix is None


def test_python_s_header_may_be_where_the_user_lets_the_compiler_look(monkeypatch, tmp_path):
    monkeypatch.delenv("CPATH", raising=False)
    missing = toolchain.python_headers(str(tmp_path / "include"))
    assert missing.found == f"{tmp_path}/include/Python.h is not there"
    assert missing.fix.startswith("apt-get install python3.")

    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CPATH", str(tmp_path))
    assert toolchain.python_headers(str(tmp_path / "include")).fix is None


def test_ninja_is_found_beside_python(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert toolchain.ninja().fix is None


def test_the_user_s_compiler_is_the_one_that_is_looked_for(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -pipe")
    monkeypatch.setenv("CC", "no-such-compiler-either")

    assert toolchain.cxx_compiler().found == "no-such-compiler is not in PATH"
    assert toolchain.c_compiler().found == "no-such-compiler-either is not in PATH"
    assert toolchain.libaio().found == "no-such-compiler-either is not in PATH"


def test_locked_memory_is_unlimited_without_a_limit():
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limits[0] != resource.RLIM_INFINITY and not toolchain._may_lock_all_memory():
        pytest.skip("there is a limit here")

    assert toolchain.locked_memory().fix is None


def test_requests_that_the_kernel_lacks_come_with_the_setting_that_has_them():
    left = toolchain.aio_requests_left()

    finding = toolchain.aio_requests(left + (1 << 22))

    assert "fs.aio-max-nr=" in finding.found
    assert int(finding.fix.rpartition("=")[2]) >= left + (1 << 22)


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()

    assert toolchain.writable(tmp_path / "new" / "folder").fix is None
    assert "Not a directory" in toolchain.writable(tmp_path / "file" / "folder").found


@pytest.mark.parametrize(
    ("choices", "found", "fix"),
    [
        ("always [madvise] never\n", "madvise", None),
        ("[always] madvise never\n", "always", None),
        ("always madvise [never]\n", "never", "echo madvise > "),
        (None, "none in this kernel", "CONFIG_TRANSPARENT_HUGEPAGE"),
    ],
)
def test_a_kernel_that_makes_no_large_pages_is_known(monkeypatch, tmp_path, choices, found, fix):
    path = tmp_path / "enabled"
    if choices is not None:
        path.write_text(choices)
    monkeypatch.setattr(toolchain, "LARGE_PAGES", str(path))

    finding = toolchain.large_pages()

    assert finding.found.rpartition(": ")[2] == found
    assert (fix in finding.fix) if fix else finding.fix is None


@pytest.fixture
def ramfs(tmp_path):
    folder = tmp_path / "ramfs"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "ramfs", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_filesystem_without_o_direct_is_known(ramfs):
    assert "without O_DIRECT" in toolchain.direct_io(ramfs).found
