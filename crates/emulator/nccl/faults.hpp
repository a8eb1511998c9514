// What a test decides about the emulated NCCL, by environment variables beside those of the emulated driver, whose seed
// and delays it shares:
//
//   EMULATED_NCCL_FAIL       ncclSend:3=ncclSystemError,ncclCommAbort:1=hang,…  the third send fails, the first abort
//                            never returns; ncclGroupEnd:2+=… from the second on
//   EMULATED_NCCL_LOST_RANK  hang (default): operations with a rank that is gone never end, as by shared memory;
//                            error: the communicator fails with ncclRemoteError, as by sockets
#pragma once

#include "abi.hpp"

namespace emulated_nccl {

// What this call is made to return, or success. Does not return where it is made to hang.
ncclResult_t injected(const char* call);

// Whether a lost rank makes a communicator fail.
bool lost_rank_is_error();

// Keeps a line as the text of the last error and returns `code`.
__attribute__((format(printf, 2, 3))) ncclResult_t warn(ncclResult_t code, const char* format, ...);
// The text of the last error.
const char* last_error();
// The text that belongs to a code.
const char* text_of(ncclResult_t code);

} // namespace emulated_nccl
