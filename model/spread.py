"""An LM spread over several devices by accelerate's hooks (`lm.device_map`).

A hook moves what a module gets to the module's device. Here they also move what it gives back to
where its input came from, so that our layer-by-layer calls find everything on the LM's first
device; keys and values stay where their layer is. Written for several GPUs and tried without: here,
modules whose weights are on disk run through the same hooks.
"""

from accelerate.hooks import AlignDevicesHook, SequentialHook
from transformers import PreTrainedModel

from epalm.errors import EpalmError

_SLOW = {"cpu", "disk"}


def check_room(lm: PreTrainedModel) -> None:
    """EpalmError when GPUs had not room enough, and a part was left in memory or on disk."""
    placed = getattr(lm, "hf_device_map", {})  # none where one device has it all
    devices = {str(device) for device in placed.values()}
    if len(devices) > 1 and devices & _SLOW:
        raise EpalmError(
            "lm.device_map: the GPUs have not enough free memory for this LM; use more of them, or "
            "set lm.dtype to bfloat16"
        )


def return_outputs(lm: PreTrainedModel) -> None:
    """Let every module that has a hook give its output back on the device of its input."""
    for module in lm.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(one, AlignDevicesHook):
                one.io_same_device = True
