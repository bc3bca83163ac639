"""Where a listener can be reached, as text."""

import pytest

from router.links.address import Address, this_host_id


@pytest.mark.parametrize("tcp_host", ["10.0.0.7", "node-3.example", "fd00::7"])
def test_an_address_comes_back_from_its_text(tcp_host: str):
    address = Address(this_host_id(), "/tmp/a:b@c/d.sock", tcp_host, 4711)
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "host", "id@host/path", "id@host:x/path", "id@host:70000/path", "@h:1/p"]
)
def test_other_text_is_refused_by_name(text: str):
    with pytest.raises(ValueError, match="is not of the form"):
        Address.parse(text)
