"""Parts of a pruning run; its loop is in `training/prune_ddpm.py`. Needs the extra `training`."""

from ..extras import check_extra

check_extra()
