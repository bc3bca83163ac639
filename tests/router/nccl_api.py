"""What cupy 14 says of the calls that Tradewind makes: the double offers these and no others."""

MODULE = {
    "get_version": "get_version()",
    "get_unique_id": "get_unique_id()",
    "groupStart": "groupStart()",
    "groupEnd": "groupEnd()",
}
COMMUNICATOR = {
    "__init__": "NcclCommunicator(int ndev, bytes commId, int rank, NcclConfig config=None)",
    "send": "NcclCommunicator.send(self, intptr_t sendbuf, size_t count, int datatype, int peer, "
    "intptr_t stream)",
    "recv": "NcclCommunicator.recv(self, intptr_t recvbuf, size_t count, int datatype, int peer, "
    "intptr_t stream)",
    "allGather": "NcclCommunicator.allGather(self, intptr_t sendbuf, intptr_t recvbuf, size_t count, "
    "int datatype, intptr_t stream)",
    "check_async_error": "NcclCommunicator.check_async_error(self)",
    "abort": "NcclCommunicator.abort(self)",
}
CONSTANTS = {"NCCL_UINT8": 1, "NCCL_FLOAT32": 7, "NCCL_BFLOAT16": 9}


def parameters(signature: str) -> list[str]:
    """Return the names of the parameters in a line of the tables above."""
    inside = signature[signature.index("(") + 1 : -1]
    return [part.split("=")[0].split()[-1] for part in inside.split(",") if part.strip() not in ("", "self")]
