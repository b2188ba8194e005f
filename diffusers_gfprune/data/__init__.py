"""Images, labels and batches. Needs the extra `training`."""

from ..extras import check_extra

check_extra()
