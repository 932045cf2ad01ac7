"""The library on PyTorch's tensors and stream, through the C functions of examples/c_abi.rs.

    cargo build --release --no-default-features --features ptx --example c_abi
    python3 examples/torch_raw.py target/release/examples/libc_abi.so

Compares O and the LSE with PyTorch's attention in f32, for f16 and bf16, causal and full, grouped heads, and
[B, N, H, D] seen as [B, H, N, D]; then times both.
"""

import ctypes
import math
import sys

import torch


class Problem(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("batch", "heads", "kv_heads", "seq_q", "seq_k", "head_dim")),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("bytes", ctypes.c_uint64), ("strides", ctypes.c_uint64 * 3)]

    @classmethod
    def of(cls, tensor):
        """A tensor [B, H, N, D] as the library takes it."""
        assert tensor.stride(3) == 1, "the last dimension must be contiguous"
        storage = tensor.untyped_storage()
        past = storage.nbytes() - tensor.storage_offset() * tensor.element_size()
        return cls(tensor.data_ptr(), past, (ctypes.c_uint64 * 3)(*tensor.stride()[:3]))


class Tensors(ctypes.Structure):
    _fields_ = [
        *((name, Tensor) for name in "qkvo"),
        ("lse", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_uint64),
    ]


class Library:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.fa_last_error.restype = ctypes.c_char_p
        self.library.fa_workspace_bytes.restype = ctypes.c_int64
        self.library.fa_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.workspaces = {}

    def error(self):
        return RuntimeError(self.library.fa_last_error().decode())

    def attention(self, q, k, v, causal):
        """O and LSE of [B, H, N, D], on the current stream."""
        (batch, heads, seq_q, d), (_, kv_heads, seq_k, _) = q.shape, k.shape
        dtype = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[q.dtype]
        right = 0 if causal else -1
        problem = Problem(dtype, batch, heads, kv_heads, seq_q, seq_k, d, -1, right, 0.0, 0.0)
        needed = self.library.fa_workspace_bytes(ctypes.byref(problem))
        if needed < 0:
            raise self.error()
        stream = torch.cuda.current_stream().cuda_stream
        # One for each stream and problem: calls on a stream follow one another.
        key = (stream, bytes(problem))
        if key not in self.workspaces:
            self.workspaces[key] = torch.zeros(max(needed, 16), dtype=torch.uint8, device=q.device)
        workspace = self.workspaces[key]
        o = torch.empty_like(q)
        lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
        views = [Tensor.of(x) for x in (q, k, v, o)]
        tensors = Tensors(*views, lse.data_ptr(), workspace.data_ptr(), workspace.numel())
        if self.library.fa_forward(ctypes.byref(problem), ctypes.byref(tensors), stream) != 0:
            raise self.error()
        return o, lse


def expected(q, k, v, causal):
    q, k, v = (x.float() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if causal:
        rows, keys = scores.shape[2:]
        hidden = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(3) @ v, scores.logsumexp(3)


def main():
    library = Library(sys.argv[1])
    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing to compare")
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")  # makes the context current
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, limit in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        for causal in (False, True):
            # [B, N, H, D], seen as [B, H, N, D].
            q, k, v = (
                torch.randn(2, n, h, 64, dtype=dtype, device="cuda").transpose(1, 2)
                for n, h in ((300, 8), (333, 2), (333, 2))
            )
            (o, lse), (o_expected, lse_expected) = library.attention(q, k, v, causal), expected(q, k, v, causal)
            far = (o.float() - o_expected).abs().max().item()
            far_lse = (lse - lse_expected).abs().max().item()
            print(f"{dtype} causal={causal}: O {far:.1e}, LSE {far_lse:.1e} from PyTorch in f32")
            assert far < limit and far_lse < 1e-3
    q = torch.randn(4, 12, 2048, 64, dtype=torch.float16, device="cuda")
    for name, run in (
        ("ours", lambda: library.attention(q, q, q, False)),
        ("PyTorch's", lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)),
    ):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()
        begin.record()
        for _ in range(100):
            run()
        end.record()
        end.synchronize()
        print(f"{name}: {begin.elapsed_time(end) / 100:.4f} ms, B 4, H 12, N 2048, D 64, f16")


if __name__ == "__main__":
    main()
