"""What a pruning run is made of; `training/prune_ddpm.py` is its loop. Needs the extra `training`."""

from ..extras import check_extra

check_extra()
