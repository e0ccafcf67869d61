import gc
import os


# Before torch, transformers and huggingface_hub are imported: they read these once.
os.environ.update({"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"})
os.environ.update({"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"})

import pytest
import torch


torch.set_num_threads(1)

# hub/against_server needs processes of its own, see hub/test_against_server.py.
collect_ignore = [] if "HUB_TESTS" in os.environ else ["hub/against_server"]


def pytest_collection_modifyitems(items):
    # Processes take a file each, in this order: the long ones first, so that none is left at the end.
    files = {item: item.nodeid.split("::")[0] for item in items}
    long = {files[item] for item in items if "slow" in item.keywords} | {"tests/lora_sb/test_peft_suite.py"}
    items.sort(key=lambda item: files[item] not in long)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Each train() collects garbage twice, which takes half a second with all that was imported, and else none."""
    gc.collect()
    gc.freeze()


def _skip_what_peft_cannot():
    try:
        return (yield)
    except ImportError as error:
        # Not at the top: it imports huggingface_hub, for which hub/against_server sets other variables first.
        import versions

        if versions.lora_sb_needs_newer_peft(error):
            pytest.skip(str(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skip_what_peft_cannot())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skip_what_peft_cannot())
