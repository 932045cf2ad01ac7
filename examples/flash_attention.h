/* Attention in a CUDA context, on a stream and in memory of the caller's: examples/c_abi.rs. */
#ifndef FLASH_ATTENTION_H
#define FLASH_ATTENTION_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What is to be computed. */
typedef struct FaProblem {
  uint32_t dtype;       /* 0: f32, 1: f16, 2: bf16 */
  uint64_t batch;
  uint64_t heads;       /* of Q and O */
  uint64_t kv_heads;    /* of K and V; divides heads */
  uint64_t seq_q;       /* rows of a head */
  uint64_t seq_k;       /* keys of a head */
  uint64_t head_dim;    /* a multiple of 8 up to 256 */
  int64_t window_left;  /* keys before its own position that a row sees; -1: all */
  int64_t window_right; /* keys after it; 0: a causal mask, -1: all */
  float scale;          /* 0: 1 / sqrt(head_dim) */
  float softcap;        /* 0: none */
} FaProblem;

/* A tensor in device memory, its rows contiguous. */
typedef struct FaTensor {
  void *address;       /* of the first element, a multiple of 16 */
  uint64_t bytes;      /* from there to the end of the memory */
  uint64_t strides[3]; /* elements from one batch entry, head and row to the next */
} FaTensor;

/* Memory of one call. */
typedef struct FaTensors {
  FaTensor q, k, v, o;
  void *lse;                /* f32 [batch, heads, seq_q]; null: not wanted */
  void *workspace;          /* zero before the first call on a stream */
  uint64_t workspace_bytes; /* at least fa_workspace_bytes */
} FaTensors;

/* What was wrong with the last call of this thread that failed; valid until the next call. */
const char *fa_last_error(void);

/* Bytes of the workspace of a problem's calls, in the context that is current; -1: an error. */
int64_t fa_workspace_bytes(const FaProblem *problem);

/* Starts attention on a stream of the context that is current, which stays until the process ends; does not
   wait. The memory stays until the stream has come to the end of the call, and nothing else uses what is written.
   0, or -1: an error. */
int32_t fa_forward(const FaProblem *problem, const FaTensors *tensors, void *stream);

/* The version of the library. */
const char *fa_version(void);

#ifdef __cplusplus
}
#endif
#endif
