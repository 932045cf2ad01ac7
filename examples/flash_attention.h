/* Attention in a CUDA context, on a stream and in memory of the caller's.
   Made of examples/c_abi.rs: edit that, then UPDATE_EXPECT=1 cargo test -p c-header. */

#ifndef FLASH_ATTENTION_H
#define FLASH_ATTENTION_H

#include <stdint.h>

/**
 * The problem of a call.
 */
typedef struct FaProblem {
  /**
   * 0: f32, 1: f16, 2: bf16.
   */
  uint32_t dtype;
  /**
   * Batch entries.
   */
  uint64_t batch;
  /**
   * Heads of Q and O.
   */
  uint64_t heads;
  /**
   * Heads of K and V, a divisor of the heads of Q.
   */
  uint64_t kv_heads;
  /**
   * Rows of a head.
   */
  uint64_t seq_q;
  /**
   * Keys of a head.
   */
  uint64_t seq_k;
  /**
   * Elements of a row, a multiple of 8 up to 256.
   */
  uint64_t head_dim;
  /**
   * Keys before its own position that a row sees; -1: all.
   */
  int64_t window_left;
  /**
   * Keys after its own position that a row sees; 0: a causal mask, -1: all.
   */
  int64_t window_right;
  /**
   * The factor of the products; 0: 1 / sqrt(head_dim).
   */
  float scale;
  /**
   * Cap of scaled scores; 0: none.
   */
  float softcap;
} FaProblem;

/**
 * A tensor in device memory, its rows contiguous.
 */
typedef struct FaTensor {
  /**
   * The first element, at a multiple of 16 bytes.
   */
  void *address;
  /**
   * Bytes from there to the end of the memory.
   */
  uint64_t bytes;
  /**
   * Elements from one batch entry, head and row to the next.
   */
  uint64_t strides[3];
} FaTensor;

/**
 * Memory of one call.
 */
typedef struct FaTensors {
  /**
   * Queries.
   */
  struct FaTensor q;
  /**
   * Keys.
   */
  struct FaTensor k;
  /**
   * Values.
   */
  struct FaTensor v;
  /**
   * The output.
   */
  struct FaTensor o;
  /**
   * Log-sum-exp, f32 `[batch, heads, seq_q]`; null: not wanted.
   */
  void *lse;
  /**
   * Zero before the first call on a stream; each call leaves it as the next one on the stream wants it.
   */
  void *workspace;
  /**
   * Its bytes, at least as many as `fa_workspace_bytes` says.
   */
  uint64_t workspace_bytes;
} FaTensors;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The error of the last failed call of this thread. The library owns the text, which lasts until
 * the thread's next failed call.
 */
const char *fa_last_error(void);

/**
 * Bytes of the workspace of a problem's calls, in the context that is current; -1 where there is
 * an error.
 *
 * # Safety
 * `problem` is null or points to a problem.
 */
int64_t fa_workspace_bytes(const struct FaProblem *problem);

/**
 * Starts attention on a stream of the context that is current, and does not wait. 0, or -1 where
 * there is an error.
 *
 * # Safety
 * - `problem` and `tensors` are null or point to what their types say.
 * - `stream` is a stream of the context that is current; null is its default stream.
 * - The memory of `tensors` is the device's until the stream has come to the end of the call;
 *   nothing else uses what is written meanwhile, and nothing writes what is read.
 * - The context stays until the process ends.
 */
int32_t fa_forward(const struct FaProblem *problem, const struct FaTensors *tensors, void *stream);

/**
 * The version of the library.
 */
const char *fa_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLASH_ATTENTION_H */
