"""Parts of an evaluation; `training/evaluate.py` is its script. Needs the extra `training`."""

from ..extras import check_extra

check_extra()
