"""Profile a training step with torch.profiler, eager and fused side by side.

config = profile_config(model="resnet18", batch_size=128)
profiles = profile_steps(config, n_steps=10)
write_files(config.out, profiles, config)
"""

from typing import TYPE_CHECKING

from resnet_fast.common.lazy import lazy_imports

__all__ = ["Part", "ProfileError", "StepProfile", "profile_config", "profile_steps", "write_files"]

if TYPE_CHECKING:
    from resnet_fast.profiling.folder import write_files
    from resnet_fast.profiling.measure import profile_steps
    from resnet_fast.profiling.recording import Part, ProfileError, StepProfile
    from resnet_fast.profiling.settings import profile_config
else:
    lazy_imports(__name__, __all__)
