"""PyTorch's attention on tensors that come through standard input.

Protocol. First line out: {"torch": version, "cuda": bool} or {"error": text}. Then, for each
job, in: a line of JSON and the bytes of tensors of the "shapes" and, if "mask", the mask u8
[B, N]; out: for each of "backends" a line of JSON and, if its "status" is "ok", the "bytes"
bytes of the output. The tensors are q, k and v at "level" "attention"; x, and weight and bias
of the projections of q, k, v and the output at "level" "module".
"""

import json
import os
import signal
import sys
import time
import warnings

# Results go to the original standard output; whatever libraries print goes elsewhere.
OUT = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
# Ctrl-C is the parent's to handle: it closes the input when it wants no more.
signal.signal(signal.SIGINT, signal.SIG_IGN)


def send(message, payload=b""):
    OUT.write(json.dumps(message).encode() + b"\n")
    OUT.write(payload)
    OUT.flush()


try:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
except Exception as error:
    send({"error": str(error)})
    sys.exit(0)

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": getattr(SDPBackend, "CUDNN_ATTENTION", None),
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def receive(job):
    """The tensors and the mask, as they came."""

    def read(shape, dtype):
        count = torch.Size(shape).numel()
        data = bytearray(sys.stdin.buffer.read(count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    tensors = [read(shape, DTYPES[job["dtype"]]) for shape in job["shapes"]]
    mask = read([job["batch"], 1, 1, job["seq_k"] or job["seq"]], torch.uint8) if job["mask"] else None
    return tensors, mask


def to_device(job, tensors, mask, device):
    """The same on the device, the mask as booleans that broadcast over heads and rows."""
    tensors = [tensor.to(device) for tensor in tensors]
    if mask is not None:
        mask = mask.to(device).bool()
        if job["causal"]:
            # PyTorch takes a mask or causality: both become one mask, made before timing.
            mask = mask & torch.ones(job["seq"], job["seq"], dtype=torch.bool, device=device).tril()
    return tensors, mask


def times(run, job, device):
    """Milliseconds of each run; on a GPU by events, each with a cold L2 cache."""
    for _ in range(job["warmup"]):
        run()
    found = []
    if device.type != "cuda":
        for _ in range(job["iters"]):
            start = time.perf_counter()
            run()
            found.append((time.perf_counter() - start) * 1e3)
        return found
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    flush = torch.empty(2 * l2, dtype=torch.uint8, device=device)
    for _ in range(job["iters"]):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return found


def sustained(run, seconds, once, device):
    """Milliseconds of a run among many back to back: on a GPU replays of a graph, in which
    Python has no part; plain calls where a backend cannot be captured."""
    runs = max(3, min(100_000, int(1e3 * seconds / max(once, 1e-3))))
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(runs):
            run()
        return (time.perf_counter() - start) * 1e3 / runs
    batch = 1
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                run()
        batch, run = 10, graph.replay
    except Exception:
        torch.cuda.synchronize(device)
    run()
    count = -(-runs // batch)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (count * batch)


def attend(job, q, k, v, mask):
    """Attention, [B, H, N, D] in and out, by the backend that is enabled."""
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=job["dropout"],
        is_causal=job["causal"] and mask is None,
        scale=job["scale"],
        **({"enable_gqa": True} if job["kv_heads"] != job["heads"] else {}),
    )


def refuse(job):
    """Raises where scaled_dot_product_attention has no option for what the job asks for."""
    left, right = job["window"]
    for wanted, what in (
        (left is not None or right not in (None, 0), "windows"),
        (job["softcap"] is not None, "caps of scores"),
        (job["alibi"], "ALiBi"),
        (job["varlen"], "packed sequences"),
        (job["bias"], "a bias of its own"),
        (job["sinks"], "sinks"),
        # Its own causal mask is aligned to the top left.
        (job["causal"] and job["seq_k"] is not None, "causal masks aligned to the bottom right"),
    ):
        if wanted:
            raise NotImplementedError(f"PyTorch's scaled_dot_product_attention has no {what}")


def forward(job, x, parameters, mask):
    """The module: heads are split and joined by strides, [B, N, H, D] seen as [B, H, N, D]."""
    linear = torch.nn.functional.linear
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = parameters
    q, k, v = (
        linear(x, w, b).unflatten(-1, (job["heads"], -1)).transpose(1, 2)
        for w, b in ((wq, bq), (wk, bk), (wv, bv))
    )
    return linear(attend(job, q, k, v, mask).transpose(1, 2).flatten(2), wo, bo)


def measure(job, backend, tensors, mask, device):
    """One backend: its first output, its memory, its times."""

    def run():
        if job["level"] == "attention":
            return attend(job, *tensors, mask)
        return forward(job, tensors[0], list(zip(tensors[1::2], tensors[2::2])), mask)

    cuda = device.type == "cuda"
    with sdpa_kernel(backend), torch.inference_mode():
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        o = run()
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
        payload = o.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        del o
        found = times(run, job, device)
        steady = None
        if job["sustained"] is not None and found:
            once = sorted(found)[len(found) // 2]
            steady = sustained(run, job["sustained"], once, device)
        return found, steady, peak, payload


def attempt(job, name, tensors, mask, device):
    """Sends what one backend did, or why it did not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if BACKENDS.get(name) is None:
                raise NotImplementedError("this PyTorch has no such backend")
            refuse(job)
            found, steady, peak, payload = measure(job, BACKENDS[name], tensors, mask, device)
        except torch.cuda.OutOfMemoryError as error:
            return send({"status": "oom", "reason": str(error).split("\n")[0]})
        except Exception as error:
            # PyTorch warns of each reason, and then says that no kernel is left.
            none_left = isinstance(error, NotImplementedError) or "No available kernel" in str(error)
            reasons = [str(w.message) for w in caught] + [str(error)]
            reasons = [r.split("\n")[0].split(" (Triggered")[0] for r in reasons]
            reasons = [r for r in reasons if not r.rstrip(".: ").endswith("not used because")]
            status = "unsupported" if none_left else "failed"
            return send({"status": status, "reason": "; ".join(reasons[:2])})
    answer = {"status": "ok", "times_ms": found, "sustained_ms": steady}
    send(answer | {"peak_bytes": peak, "bytes": len(payload)}, payload)


def main():
    send({"torch": torch.__version__, "cuda": torch.cuda.is_available()})
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        device = torch.device(job["device"])
        torch.manual_seed(job["seed"])
        tensors, mask = receive(job)
        try:
            tensors, mask = to_device(job, tensors, mask, device)
        except torch.cuda.OutOfMemoryError as error:
            for _ in job["backends"]:
                send({"status": "oom", "reason": str(error).split("\n")[0]})
            continue
        for name in job["backends"]:
            attempt(job, name, tensors, mask, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del tensors, mask


main()
