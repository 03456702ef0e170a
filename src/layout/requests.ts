/**
 * Requests to the kernel, of a lane with a file at one end (a queue of a TAP interface): where they lie in memory 0.
 *
 * The core writes requests, the kernel takes them, and writes completions, which the core reads: io_uring's submission
 * entries and completion queue, or those of Linux AIO, in place. How either looks is described by REQUEST_FORMAT, so the core
 * knows one way only. Every request has completed when the system call that hands them over returns.
 *
 * Plain constants only: asc, tsc, Node and vitest import this same file.
 */

/** Requests that may be handed over at once; a power of two. */
export const REQUESTS_MAX = 64;

// The ring of requests: 64 of 64 bytes, one page (io_uring: SQEs, AIO: iocbs). Number n lies in slot n mod REQUESTS_MAX.
export const REQUESTS = 0x28_0000;
export const REQUEST_BYTES = 64;
// io_uring's rings, or AIO's events: one page
export const COMPLETIONS = 0x28_1000;
export const COMPLETIONS_BYTES = 4096;
// AIO: u64 addresses of the requests, twice over, so that any 64 in turn are neighbours
export const REQUEST_POINTERS = 0x28_2000;

// How requests and completions look (u32 each). Written when the lane gets its queue of requests.
export const REQUEST_FORMAT = 0x28_3000;
export const FORMAT_OPERATION = 0; // offset of the operation's byte in a request
export const FORMAT_ADDRESS = 4; // offset of the u64 address
export const FORMAT_LENGTH = 8; // offset of the u32 length in bytes, or number of iovecs
export const FORMAT_WHOLE = 12; // operation: one stretch of memory
export const FORMAT_VECTOR = 16; // operation: iovecs
export const FORMAT_TAIL = 20; // address of the u32 number of the next request
export const FORMAT_DONE_HEAD = 24; // address of the u32 number of the next completion to read
export const FORMAT_DONE_TAIL = 28; // address of the u32 number behind the last completion
export const FORMAT_DONE_MASK = 32; // completions of their ring, less one
export const FORMAT_DONE = 36; // address of the first completion; it begins with the u32 slot of its request
export const FORMAT_DONE_SHIFT = 40; // log2 of a completion's size
export const FORMAT_DONE_RESULT = 44; // offset of its i32 result: bytes, or an errno, negative

// Where memories begin in this process (u64 each): memory 0, then the segments of the guest
export const MEMORY_BASES = 0x28_3040;

// Of a lane that reads (u32 each)
export const READ_BYTES_MAX = 0x28_3090; // no frame is longer, net header included; a buffer with more room needs no bounce
export const READS_NEXT = 0x28_3080; // how many reads to ask for at once
export const READS_SINCE = 0x28_3094; // frames read since there was nothing to read, as far as that matters
export const READS_LARGE = 0x28_3084; // for so many frames more, one read at a time has all buffers that a large frame takes
export const HELD_NEXT = 0x28_3088; // frames that were read and not delivered: number of the first one's request
export const HELD_END = 0x28_308c; // and the number behind the last one's; equal: none

// One record for each chain that is being carried
export const CARRIED = 0x28_4000;
export const CARRIED_BYTES = 64;

// iovecs { u64 address, u64 length } of all requests handed over at once
export const IOVECS = 0x28_8000;
export const IOVECS_MAX = 4096;
export const IOVEC_BYTES = 16;
/** What the kernel takes in one request (UIO_MAXIOV). */
export const REQUEST_IOVECS_MAX = 1024;

// A net header of NET_HDR_SIZE for each request, where the guest's own is not the file's
export const FILE_HEADERS = 0x29_8000;
export const FILE_HEADER_BYTES = 16;

// A frame for each request: what is read beyond the guest's buffers, or is in too many pieces to be written
export const BOUNCES = 0x2a_0000;
export const BOUNCE_BYTES = 0x1_0100;
