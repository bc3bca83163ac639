import numpy as np

from cluster.demo.gguf_checkpoint import rotate_half_order


def llama_cpp_permute(weight, num_heads):
    """What convert_hf_to_gguf.py does to a q or k projection."""
    rows, inputs = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def test_rotate_half_order_undoes_what_llama_cpp_does():
    weight = np.arange(3 * 8 * 5, dtype=np.float32).reshape(3 * 8, 5)
    np.testing.assert_array_equal(rotate_half_order(llama_cpp_permute(weight, 3), 3), weight)
