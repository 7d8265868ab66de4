"""Host memory that disks and GPUs fill: what the kernel says of its pages."""

import re
from pathlib import Path

import pytest
import torch

from zi_experiments.runtime.pinned_memory import host_empty
from zi_experiments.system.toolchain import LARGE_PAGES


def flags_of(tensor):
    """What `VmFlags` of the mapping that begins with a tensor say (proc(5))."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (mapping,) = [each for each in mappings if each.startswith(f"{tensor.data_ptr():x}-")]
    return re.search(r"^VmFlags: (.*)$", mapping, re.MULTILINE)[1].split()


@pytest.mark.skipif(not Path(LARGE_PAGES).is_file(), reason="a kernel without transparent huge pages")
def test_large_pages_are_asked_for_where_a_program_may_have_them():
    flags = flags_of(host_empty(8 << 20, torch.uint8, pinned=False))

    assert "hg" in flags
    assert "sh" not in flags  # of shared pages most kernels make no large ones, whatever is asked for


def test_a_child_gets_no_copy_of_the_pages():
    """After a fork whoever writes first gets a new page, and a device would go on with the old one."""
    assert "dc" in flags_of(host_empty(8 << 20, torch.uint8, pinned=False))
