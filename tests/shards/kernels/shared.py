"""Where memory in huge pages can be shared at all."""

import pytest

from shards.kernels import shared_pages
from shards.kernels.huge_pages import PAGE_BYTES

CAN_SHARE = shared_pages.create(PAGE_BYTES) is not None
needs_sharing = pytest.mark.skipif(not CAN_SHARE, reason="the system gives no huge pages to share")
