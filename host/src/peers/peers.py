"""PyTorch's attention, and packages for it, on tensors that come through standard input.

Protocol. First line out: {"torch": version, "cuda": bool, "packages": names} or {"error": text}.
Then, for each job, in: a line of JSON and the bytes of tensors of the "shapes" and, if "mask",
the mask u8 [B, N]; out: for each of "backends" a line of JSON and, if its "status" is "ok", the
"bytes" bytes of the outputs, one after the other. The tensors are q, k and v at "level" "attention";
x, and weight and bias of the projections of q, k, v and the output at "level" "module"; q and a cache, of
which "caches" copies are used in turn, at level "decode" (its job has fields of its own). At the levels
"backward" and "module-backward" the gradient of the output comes after these, and the outputs are
the gradients of the others, in their order. Slopes of ALiBi, sinks and the beginnings of packed
sequences are lists in the line of JSON.
"""

import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext

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

# PyTorch's own backends of scaled_dot_product_attention.
SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": getattr(SDPBackend, "CUDNN_ATTENTION", None),
}
# FlashAttention's releases for Ampere, Hopper, and Hopper and Blackwell.
PACKAGES = ["flash_attn", "flash_attn_interface", "flash_attn.cute"]
# Aligned to the top left, PyTorch's own causal mask is another one.
ALIGNED = "causal masks aligned to the bottom right"
# What a backend is able to do beyond plain and causal attention.
ABLE = {name: {"dropout", "padding masks"} for name in SDPA} | {
    "flex": {"padding masks", "windows", "caps of scores", "ALiBi", ALIGNED},
    "flash_attn": {"dropout", "windows", "caps of scores", "ALiBi", "packed sequences", ALIGNED},
    "flash_attn_interface": {"windows", "caps of scores", "packed sequences", ALIGNED},
    "flash_attn.cute": {"windows", "caps of scores", "packed sequences", "sinks", ALIGNED},
}
# The numbers of parts that are tried of flash_attn.cute; 0 is its own choice.
CUTE_SPLITS = [0, 16, 32]
# Of FlashInfer's workspace.
FLASHINFER_BYTES = 256 << 20
# What none of them can do where gradients are asked for: the sinks' own gradient is not among theirs.
NO_GRADIENT = {"sinks"}
# Before each backend that is measured at the power limit: what ran before has warmed the GPU for none
# of them.
REST_SECONDS = 0.5
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Codes as bytes: no peer computes with them.
DTYPES["e4m3"] = torch.uint8


def receive(job):
    """The tensors and the mask, as they came."""

    def read(shape, dtype):
        count = torch.Size(shape).numel()
        data = bytearray(sys.stdin.buffer.read(count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    # Of a decode, the cache may have a type of its own.
    types = [job["dtype"]] + [job.get("stored", job["dtype"])] * (len(job["shapes"]) - 1)
    tensors = [read(shape, DTYPES[of]) for shape, of in zip(job["shapes"], types)]
    mask = read([job["batch"], 1, 1, job["seq_k"] or job["seq"]], torch.uint8) if job["mask"] else None
    return tensors, mask


def to_device(tensors, mask, device):
    """The same on the device, the mask as booleans that broadcast over heads and rows."""
    tensors = [tensor.to(device) for tensor in tensors]
    return tensors, None if mask is None else mask.to(device).bool()


def captured(run, runs=1):
    """Replays of a graph of `runs` runs, in which Python and autograd's engine have no part: the
    library's own kernels. None where a backend cannot be captured. Nodes of a backward pass run on the
    stream of their forward pass: it is the current one here."""
    stream = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        # Not on the default stream, which cannot be captured.
        side = stream if stream != torch.cuda.default_stream() else None
        with torch.cuda.graph(graph, stream=side):
            for _ in range(runs):
                run()
        return graph.replay
    except Exception:
        torch.cuda.synchronize()
        return None


def times(run, job, device):
    """Milliseconds of each run; on a GPU by events, each with a cold L2 cache."""
    for _ in range(job["warmup"]):
        run()
    found = []
    if device.type == "cuda" and is_backward(job):
        # Autograd's engine needs longer than a short pass: replays leave only its launches.
        run = captured(run) or run
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
    batch, replay = 10, captured(run, 10)
    if replay is None:
        batch, replay = 1, run
    run = replay
    run()
    count = -(-runs // batch)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (count * batch)


def is_backward(job):
    """Whether gradients are asked for."""
    return job["level"] in ("backward", "module-backward")


def wanted(job):
    """What the job asks for beyond plain and causal attention, by the names of ABLE."""
    left, right = job["window"]
    asked = {
        "dropout": job["dropout"] > 0,
        "padding masks": job["mask"],
        "windows": left is not None or right not in (None, 0),
        "caps of scores": job["softcap"] is not None,
        "ALiBi": job["alibi"],
        "packed sequences": job["varlen"],
        "bias of its own": job["bias"],
        "sinks": job["sinks"],
        ALIGNED: job["causal"] and job["seq_k"] is not None,
    }
    return [what for what, is_asked in asked.items() if is_asked]


def sdpa(job, device, mask):
    """scaled_dot_product_attention by the backend that is enabled."""
    if mask is not None and job["causal"]:
        # It takes a mask or causality: both become one mask, made before timing.
        seq = job["seq"]
        mask = mask & torch.ones(seq, seq, dtype=torch.bool, device=device).tril()
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=job["dropout"],
        is_causal=job["causal"] and mask is None,
        scale=job["scale"],
        **({"enable_gqa": True} if job["kv_heads"] != job["heads"] else {}),
    )


def flex(job, device, mask):
    """PyTorch's FlexAttention, compiled, its block mask made before timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Each problem is a compilation of its own.
    torch._dynamo.config.recompile_limit = 1 << 20
    if is_backward(job):
        import torch._functorch.config as functorch

        # A compiled backward pass would reuse what the forward pass has kept, which another run reads.
        if hasattr(functorch, "donated_buffer"):
            functorch.donated_buffer = False
    seq_q, seq_k = job["seq"], job["seq_k"] or job["seq"]
    left, right = job["window"]
    slopes = torch.tensor(job["alibi_slopes"] or [0.0], device=device)
    cap, alibi, offset = job["softcap"], job["alibi"], seq_k - seq_q

    def seen(b, h, i, j):
        sees = j >= 0
        if left is not None:
            sees = sees & (j >= i + offset - left)
        if right is not None:
            sees = sees & (j <= i + offset + right)
        return sees if mask is None else sees & mask[b, 0, 0, j]

    def shaped(score, b, h, i, j):
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        return score - slopes[h] * (i + offset - j).abs() if alibi else score

    hides = mask is not None or (left, right) != (None, None)
    batch = job["batch"] if mask is not None else None
    blocks = create_block_mask(seen, batch, None, seq_q, seq_k, device=device) if hides else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(
        q,
        k,
        v,
        score_mod=shaped if cap is not None or alibi else None,
        block_mask=blocks,
        scale=job["scale"],
        enable_gqa=job["kv_heads"] != job["heads"],
    )


def packaged(job, name, device):
    """A package's function, [B, H, N, D] or [1, total, H, D] in and out."""
    package = importlib.import_module(name)
    left, right = job["window"]
    unbounded = None if name == "flash_attn.cute" else -1
    options = {"softmax_scale": job["scale"], "causal": job["causal"]}
    if "windows" in wanted(job):
        options["window_size"] = tuple(unbounded if n is None else n for n in (left, right))
    if job["softcap"] is not None:
        options["softcap"] = job["softcap"]
    if job["alibi"]:
        options["alibi_slopes"] = torch.tensor(job["alibi_slopes"], device=device)
    if job["sinks"]:
        options["learnable_sink"] = torch.tensor(job["sink_scores"], device=device).bfloat16()
    if job["dropout"] > 0:
        options["dropout_p"] = job["dropout"]
    if job["deterministic"]:
        options["deterministic"] = True

    def output(o):
        return o[0] if isinstance(o, tuple) else o

    if job["varlen"]:
        q_begins, k_begins = (torch.tensor(x, dtype=torch.int32, device=device) for x in job["cu_seqlens"])
        lengths = {
            "cu_seqlens_q": q_begins,
            "cu_seqlens_k": k_begins,
            "max_seqlen_q": job["seq"],
            "max_seqlen_k": job["seq_k"] or job["seq"],
        }
        run = package.flash_attn_varlen_func
        # Not q[0], whose gradient is a copy.
        return lambda *qkv: output(run(*(x.squeeze(0) for x in qkv), **lengths, **options))[None]
    run = package.flash_attn_func
    return lambda *qkv: output(run(*(x.transpose(1, 2) for x in qkv), **options)).transpose(1, 2)


def attention(job, name, mask, device):
    """A function of q, k and v, by the backend of that name."""
    able = ABLE[name] - NO_GRADIENT if is_backward(job) else ABLE[name]
    lacks = [what for what in wanted(job) if what not in able]
    if lacks:
        raise NotImplementedError(f"it has no {', no '.join(lacks)}")
    if name in SDPA:
        return sdpa(job, device, mask)
    if name == "flex":
        return flex(job, device, mask)
    return packaged(job, name, device)


def forward(job, attend, x, parameters):
    """The module: heads are split and joined by strides, [B, N, H, D] seen as [B, H, N, D]."""
    linear = torch.nn.functional.linear
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = parameters
    q, k, v = (
        linear(x, w, b).unflatten(-1, (job["heads"], -1)).transpose(1, 2)
        for w, b in ((wq, bq), (wk, bk), (wv, bv))
    )
    return linear(attend(q, k, v).transpose(1, 2).flatten(2), wo, bo)


class Work:
    """What a level runs: `run` gives its outputs; where it has both passes, `forward` is the first of
    them, and `alone` gives each by the name of its time."""

    def __init__(self, job, attend, tensors):
        of_module = job["level"].startswith("module")

        def output(tensors):
            if not of_module:
                return attend(*tensors)
            return forward(job, attend, tensors[0], list(zip(tensors[1::2], tensors[2::2])))

        self.alone, self.forward = lambda: [], None
        if not is_backward(job):
            self.run = lambda: [output(tensors)]
            return
        *tensors, gradient = tensors
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]

        def gradients(o):
            # Sums in .grad are no part of a backward pass. The graph of the forward pass stays for the
            # next run.
            return torch.autograd.grad(o, leaves, gradient, retain_graph=True)

        def alone():
            # The backward pass of a forward pass that has run before.
            o = output(leaves)
            return [("forward_ms", self.forward), ("backward_ms", lambda: gradients(o))]

        if of_module:
            self.forward, self.alone = lambda: output(leaves), alone
            self.run = lambda: gradients(output(leaves))
        else:
            o = output(leaves)
            self.run = lambda: gradients(o)


def median(values):
    """The middle one, or the mean of the two there."""
    values, half = sorted(values), len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def measure(job, name, tensors, mask, device):
    """One backend: its answer and its first outputs."""
    attend = attention(job, name, mask, device)
    cuda, gradients = device.type == "cuda", is_backward(job)
    # The nodes of a backward pass run on the stream of the forward pass, which has to be one that can
    # be captured.
    side = torch.cuda.Stream(device) if cuda and gradients else None
    with (
        sdpa_kernel(SDPA[name]) if name in SDPA else nullcontext(),
        nullcontext() if gradients else torch.inference_mode(),
        torch.cuda.stream(side) if side is not None else nullcontext(),
    ):
        if cuda and job["sustained"] is not None:
            time.sleep(REST_SECONDS)
        if cuda:
            torch.cuda.synchronize(device)
        work = Work(job, attend, tensors)

        def peak_of(run):
            """PyTorch's peak memory during a run, on a GPU, and what it gives."""
            if cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            given = run()
            return torch.cuda.max_memory_allocated(device) if cuda else None, given

        forward_peak = peak_of(work.forward)[0] if work.forward else None
        peak, outputs = peak_of(work.run)
        payload = b"".join(o.contiguous().cpu().view(torch.uint8).numpy().tobytes() for o in outputs)
        del outputs
        found = times(work.run, job, device)
        alone = {name: median(times(run, job, device)) for name, run in work.alone()}
        alone["forward_peak_bytes"] = forward_peak
        steady = None
        if job["sustained"] is not None and found:
            steady = sustained(work.run, job["sustained"], median(found), device)
        answer = {"status": "ok", "times_ms": found, "sustained_ms": steady, "peak_bytes": peak}
        return answer | alone, payload


def decode_calls(job, name, q, caches, device):
    """Lists of functions with the splits of each list, where they are known: a function for each copy of the
    cache, which gives O [B, Nq, H, D]. Of several lists the fastest counts."""
    paged, queries = job["page_size"] > 0, job["seq"]
    lacks = {
        "cache in another type": job["stored"] != job["dtype"],
        "windows": job["window"],
        "pages": paged and not name.startswith("flashinfer"),
        "contiguous caches": not paged and name.startswith("flashinfer"),
        "several queries with a bottom-right diagonal": queries > 1 and name != "flash_attn.cute",
    }
    lacks = [what for what, is_so in lacks.items() if is_so]
    if lacks:
        raise NotImplementedError(f"it has no {', no '.join(lacks)} here")
    if name in SDPA:
        attend = torch.nn.functional.scaled_dot_product_attention
        grouped = {"enable_gqa": True} if job["kv_heads"] != job["heads"] else {}
        q = q.transpose(1, 2)

        def of_sdpa(k, v):
            return lambda: attend(q, k.transpose(1, 2), v.transpose(1, 2), **grouped).transpose(1, 2)

        return [(None, [of_sdpa(k, v) for k, v in caches])]
    if name == "flash_attn.cute":
        attend = importlib.import_module(name).flash_attn_func

        def of_cute(k, v, splits):
            def run():
                o = attend(q, k, v, causal=True, num_splits=splits)
                return o[0] if isinstance(o, tuple) else o

            return run

        return [(n or None, [of_cute(k, v, n) for k, v in caches]) for n in CUTE_SPLITS]
    flashinfer = importlib.import_module("flashinfer")
    batch, page, keys = job["batch"], job["page_size"], job["seq_k"]
    pages = -(-keys // page)
    ints = {"dtype": torch.int32, "device": device}
    starts = torch.arange(0, batch + 1, **ints) * pages
    table = torch.tensor(job["page_table"], **ints)
    last = torch.full((batch,), keys - (pages - 1) * page, **ints)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(FLASHINFER_BYTES, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=name.endswith("tensor-cores"),
        paged_kv_indptr_buffer=starts.clone(),
        paged_kv_indices_buffer=table.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    sizes = (job["heads"], job["kv_heads"], job["head_dim"], page)
    wrapper.plan(starts, table, last, *sizes, q_data_type=q.dtype, kv_data_type=q.dtype)
    rows = q.squeeze(1)
    out = torch.empty_like(rows)

    def of_flashinfer(cache):
        return lambda: wrapper.run(rows, cache, out=out).unsqueeze(1)

    return [(None, [of_flashinfer(cache) for cache in caches])]


def replayed(calls, job):
    """Milliseconds of a run in a graph of "together" runs, the calls in turn, replayed back to back."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in range(job["together"]):
            calls[run % len(calls)]()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(job["replays"]):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (job["replays"] * job["together"])


def measure_decode(job, name, tensors, mask, device):
    """One peer on a decode: its answer and O of its fastest way."""
    q, k, v = tensors
    copies = job["caches"] - 1
    caches = [(k, v)] + [(k.clone(), v.clone()) for _ in range(copies)]
    best, failure = None, None
    with sdpa_kernel(SDPA[name]) if name in SDPA else nullcontext(), torch.inference_mode():
        for splits, calls in decode_calls(job, name, q, caches, device):
            try:
                output = calls[0]().clone()
                if device.type == "cuda":
                    found = {"replayed_ms": replayed(calls, job)}
                else:
                    found = {"times_ms": times(calls[0], {"warmup": 1, "level": "decode", **job}, device)}
            except Exception as error:
                failure = failure or error
                continue
            shown = found.get("replayed_ms") or median(found["times_ms"])
            if best is None or shown < best[0]:
                best = shown, found | {"splits": splits}, output
    if best is None:
        raise failure
    _, found, output = best
    return found | {"status": "ok"}, output.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def attempt(job, name, tensors, mask, device):
    """Sends what one backend did, or why it did not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if name in SDPA and SDPA[name] is None:
                raise NotImplementedError("this PyTorch has no such backend")
            run = measure_decode if job["level"] == "decode" else measure
            answer, payload = run(job, name, tensors, mask, device)
        except torch.cuda.OutOfMemoryError as error:
            return send({"status": "oom", "reason": str(error).split("\n")[0]})
        except Exception as error:
            # PyTorch warns of each reason, and then says that no kernel is left.
            none_left = isinstance(error, (NotImplementedError, ImportError))
            none = ["No available kernel", "does not have a deterministic implementation"]
            none_left = none_left or any(text in str(error) for text in none)
            reasons = [str(w.message) for w in caught] + [str(error)]
            reasons = [r.split("\n")[0].split(" (Triggered")[0] for r in reasons]
            reasons = [r for r in reasons if not r.rstrip(".: ").endswith("not used because")]
            status = "unsupported" if none_left else "failed"
            return send({"status": status, "reason": "; ".join(reasons[:2])})
    send(answer | {"bytes": len(payload)}, payload)


def is_there(name):
    """Whether a package can be imported, so far as that is known without doing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def deterministic():
    """The same bits each time, or none at all."""
    # As torch.use_deterministic_algorithms asks, before the first product.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def main():
    packages = [name for name in PACKAGES if is_there(name)]
    send({"torch": torch.__version__, "cuda": torch.cuda.is_available(), "packages": packages})
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        device = torch.device(job["device"])
        if device.type == "cuda":
            # Events and graphs are those of the current device.
            torch.cuda.set_device(device)
        torch.manual_seed(job["seed"])
        if job["deterministic"]:
            deterministic()
        tensors, mask = receive(job)
        try:
            tensors, mask = to_device(tensors, mask, device)
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
