/* A library in place of libcuda: the driver calls of outside-cudarc, with answers that no
 * driver gives. Its file is libcuda.so, as the linker asks for; it is loaded by another name. */
#include <stddef.h>

static int calls;

int stub_calls(void) { return calls; }
int cuInit(unsigned flags) { (void)flags; ++calls; return 0; }
int cuDriverGetVersion(int *version) { *version = 424242; ++calls; return 0; }
int cuDeviceGetCount(int *count) { *count = 42; ++calls; return 0; }
int cuGetErrorName(int code, const char **text) { (void)code; *text = "STUB"; return 0; }
int cuGetErrorString(int code, const char **text) { (void)code; *text = "stub"; return 0; }
