#!/usr/bin/env python3
"""A multi-head attention module made by PyTorch, as files that `flash-attention run` reads.

    python3 examples/torch_module.py DIR            save weights, input and output
    python3 examples/torch_module.py DIR --check    and let `flash-attention run --check` reproduce them

In each of f32, f16 and bf16: DIR/<type>-weights.safetensors is the module's state_dict,
DIR/<type>.safetensors has x, y and, with --mask, the padding mask. All three start from the
same numbers, rounded to the type. PyTorch runs on its GPU if it has one. With --packed the module is
torch.nn.MultiheadAttention, whose state_dict has in_proj_weight in place of three projections.
"""

import argparse
import json
import pathlib
import struct
import subprocess
import sys

import torch

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}


class MultiHeadAttention(torch.nn.Module):
    """[B, N, hidden] in and out; its state_dict has the names that `flash-attention run` looks for."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, torch.nn.Linear(hidden, hidden))

    def forward(self, x, mask=None, causal=False):
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if mask is not None:
            mask = mask[:, None, None, :]
            if causal:
                mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
                causal = False
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(o.transpose(1, 2).flatten(2))


class Packed(torch.nn.MultiheadAttention):
    """PyTorch's own module. Its biases begin as zeros, which would hide one that is left out."""

    def __init__(self, hidden, heads):
        super().__init__(hidden, heads, batch_first=True)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            torch.nn.init.normal_(bias, std=0.1)

    def forward(self, x, mask=None, causal=False):
        # Here True hides, in both masks.
        hidden = None if mask is None else ~mask
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1) if causal else None
        return super().forward(x, x, x, key_padding_mask=hidden, attn_mask=later, need_weights=False)[0]


def save(path, tensors):
    """Writes a safetensors file: the length of a header, the header, the elements."""
    header, payload = {}, b""
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        data = data.flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        payload += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def make(folder, name, options):
    """Saves the module in one type: weights, input and output."""
    torch.manual_seed(options.seed)
    module = (Packed if options.packed else MultiHeadAttention)(options.hidden, options.heads)
    x = torch.randn(options.batch, options.seq, options.hidden)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, x = module.to(device, TYPES[name]).eval(), x.to(device, TYPES[name])
    tensors = {"x": x}
    if options.mask:
        # Each sequence ends earlier than the one before.
        lengths = torch.linspace(options.seq, options.seq // 2, options.batch).long()
        tensors["mask"] = (torch.arange(options.seq) < lengths[:, None]).to(device)
    with torch.inference_mode():
        tensors["y"] = module(x, tensors.get("mask"), options.causal)
    save(folder / f"{name}-weights.safetensors", module.state_dict())
    save(folder / f"{name}.safetensors", tensors)
    print(f"{name}: saved, from {device}", flush=True)


def check(folder, name, options):
    """The exit code of `flash-attention run --check` on what was saved."""
    files = ["--input", folder / f"{name}.safetensors", "--weights", folder / f"{name}-weights.safetensors"]
    command = [*options.host.split(), "run", *files, "--heads", options.heads, "--check"]
    command += ["--causal"] if options.causal else []
    command += ["--device", options.device, "--kernel", options.kernel]
    return subprocess.run([str(part) for part in command]).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--mask", action="store_true")
    parser.add_argument("--packed", action="store_true", help="make a torch.nn.MultiheadAttention")
    parser.add_argument("--check", action="store_true", help="run `flash-attention run --check` on the files")
    parser.add_argument("--host", default="cargo run -q -p host --", help="how to start it")
    parser.add_argument("--device", default="auto", help="where it runs")
    parser.add_argument("--kernel", default="best", help="which kernel it runs")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in TYPES:
        make(options.folder, name, options)
    if options.check:
        sys.exit(max(check(options.folder, name, options) for name in TYPES))


main()
