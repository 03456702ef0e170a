/**
 * A lane's memory 0: what the control plane and the core share about one direction of one queue pair.
 *
 *   0x000000  lane state: the two virtqueues, counters, a frame to inject
 *   0x001000  source extents, 0x00a000 destination extents: guest physical ranges -> (segment, offset)
 *   0x014000  source, 0x015000 destination: the page with the virtqueue's inflight header, where there is one. It is a
 *             page of a front-end's file, mapped: the core writes the header and never reads it
 *   0x020000  source pieces: the transmit chain being carried, validated and translated
 *   0x130000  destination pieces: the receive chains it goes to
 *   0x240000  merged chains: which receive chains those are, and how much goes into each
 *   0x280000  requests to the kernel, of a lane with a file at one end: src/layout/requests.ts
 *
 * No guest byte lies in here but the headers of a frame that is being segmented, and frames on their way to or from a file that
 * do not fit the usual way. The control plane writes state and extents only while the poller has parked the lane;
 * counters may be read at any time. Plain constants only: asc, tsc, Node and vitest import this same file.
 *
 * A *position* is a place in the order of a ring's chains: of a split ring an avail or used index, mod 2^16; of a packed
 * one index | wrap << 15, as SET_VRING_BASE has it.
 */

export const LANE_PAGES = 107; // of 64 KiB

// The two virtqueues: the source end's transmitq, the destination end's receiveq
export const SOURCE_VRING = 0x100;
export const DESTINATION_VRING = 0x180;

// One virtqueue: all that is known of it; whoever has these bytes can go on with the ring
export const VRING_BYTES = 128;
export const VRING_FLAGS = 0; // u32, VRING_* below
export const VRING_SIZE = 4; // u32
export const VRING_HEADER_SIZE = 8; // u32, bytes of the net header: 10 or 12
export const VRING_DESC_SEGMENT = 12; // u32
export const VRING_AVAIL_SEGMENT = 16; // u32
export const VRING_USED_SEGMENT = 20; // u32
export const VRING_DESC = 24; // u64, offset in its segment; packed: descriptor ring
export const VRING_AVAIL = 32; // u64; packed: driver event suppression
export const VRING_USED = 40; // u64; packed: device event suppression
export const VRING_NEXT_AVAIL = 48; // u32, position of the next chain to take
export const VRING_NEXT_USED = 52; // u32, position of the next chain to give back
export const VRING_PUBLISHED = 56; // u32, position up to which the driver sees chains given back
export const VRING_UNDECIDED = 60; // u32, slots given back since it was last decided whether to call the driver
export const VRING_LIMIT = 64; // u32, split: the avail index as last loaded
export const VRING_WAITING = 68; // u32, 0, or 0x10000 | position of the first chain that is missing for the next frame
export const VRING_INFLIGHT = 72; // u32, address of the inflight header in memory 0; 0: none
export const VRING_SEGMENTS_SENT = 76; // u32, of the source: segments of the next frame that have been delivered
export const VRING_OFFLOADS = 80; // u32, OFFLOAD_*: what this driver may leave to the device, or takes from it
export const VRING_HELD = 88; // u64, packed: length, id and flags of the descriptor at PUBLISHED, to be stored last

// VRING_FLAGS
export const VRING_READY = 1; // started, areas mapped
export const VRING_ENABLED = 2;
export const VRING_EVENT_IDX = 4;
export const VRING_INDIRECT = 8;
export const VRING_MERGEABLE = 16;
export const VRING_BROKEN = 32; // the core stopped it: the driver broke the format
export const VRING_FRESH = 64; // just started: the used index is still to be taken from guest memory
export const VRING_SINK = 128; // no virtqueue at all: swallows every frame (null port)
export const VRING_PACKED = 256;
export const VRING_FILE = 512; // no virtqueue: this end is a file, frames pass through requests (src/layout/requests.ts)

// VRING_OFFLOADS
export const OFFLOAD_CSUM = 1; // of a transmitq VIRTIO_NET_F_CSUM, of a receiveq VIRTIO_NET_F_GUEST_CSUM
export const OFFLOAD_TSO4 = 2; // HOST_TSO4, GUEST_TSO4
export const OFFLOAD_TSO6 = 4;
export const OFFLOAD_ECN = 8;

// The extent found last, one per end: an EXTENT_* record
export const SOURCE_HIT = 0x040;
export const DESTINATION_HIT = 0x060;

// Counters (u64 each)
export const COUNTERS = 0x200;
export const COUNT_PACKETS = 0;
export const COUNT_BYTES = 8; // frame bytes, without the net header
export const COUNT_BATCHES = 16; // polls that moved anything
export const COUNT_CALLS_SOURCE = 24;
export const COUNT_CALLS_DESTINATION = 32;
export const COUNT_CALLS_SUPPRESSED = 40; // decisions that the driver wants no call
export const COUNT_KICKS = 48; // wake-ups by a kick; written by the poller
export const COUNT_WAITS = 56; // times the lane began to wait for receive buffers
export const COUNT_MALFORMED = 64; // receive chains returned with length 0; transmit ones are drops
// Drops by reason: transmit chains that were consumed and went nowhere
export const COUNT_DROP_NO_RECEIVER = 72; // the receiveq is stopped, disabled or absent
export const COUNT_DROP_NO_BUFFER = 80; // no receive buffers for longer than the stall limit
export const COUNT_DROP_TOO_SMALL = 88; // the receive buffers cannot hold the frame
export const COUNT_DROP_MALFORMED = 96; // descriptor chain breaks a rule
export const COUNT_DROP_BAD_FRAME = 104; // shorter than an Ethernet header, too long, or an offload nobody negotiated
export const COUNT_DROP_DISABLED = 112; // sent on a started but disabled transmitq

// A frame of the control plane's own making, for inject()
export const INJECT_FRAME = 0x400;
export const INJECT_BYTES_MAX = 1514;

// The first bytes of a frame that is being segmented: headers, read once
export const HEADERS = 0xa00;
export const HEADERS_BYTES_MAX = 256;

// Extents: u32 count, then 32-byte entries sorted by gpa
export const SOURCE_EXTENTS = 0x1000;
export const DESTINATION_EXTENTS = 0xa000;
export const EXTENTS_MAX = 1024;
export const EXTENTS_FIRST = 32; // offset of the first entry
export const EXTENT_BYTES = 32;
export const EXTENT_GPA = 0; // u64
export const EXTENT_SIZE = 8; // u64
export const EXTENT_OFFSET = 16; // u64, in its segment
export const EXTENT_SEGMENT = 24; // u32

// Where the 4096-byte page of an inflight region that holds a virtqueue's header is mapped
export const SOURCE_INFLIGHT = 0x1_4000;
export const DESTINATION_INFLIGHT = 0x1_5000;
export const INFLIGHT_PAGE_BYTES = 4096;

// Pieces: contiguous stretches of guest memory
export const SOURCE_PIECES = 0x2_0000;
export const DESTINATION_PIECES = 0x13_0000;
export const PIECES_MAX = 69_632;
export const PIECE_BYTES = 16;
export const PIECE_OFFSET = 0; // u64
export const PIECE_LENGTH = 8; // u32
export const PIECE_SEGMENT = 12; // u32

// Merged chains: u16 id, u16 slots, u32 bytes written
export const MERGED_CHAINS = 0x24_0000;
export const MERGED_BYTES = 8;
export const MERGED_ID = 0;
export const MERGED_SLOTS = 2;
export const MERGED_WRITTEN = 4;

// Frames: 64 KiB of packet and any link-layer header
export const FRAME_BYTES_MIN = 14;
export const FRAME_BYTES_MAX = 65_600;

// Result of poll(): packets taken from the source in the low 16 bits, then what is due
export const POLL_COUNT = 0xffff;
export const POLL_CALL_SOURCE = 0x1_0000;
export const POLL_CALL_DESTINATION = 0x2_0000;
export const POLL_BROKE_SOURCE = 0x4_0000;
export const POLL_BROKE_DESTINATION = 0x8_0000;
export const POLL_WAITING = 0x10_0000; // for receive buffers
export const POLL_FILE_WAITS = 0x40_0000; // the file at one end is full, or empty: nothing can be done before that changes
export const POLL_FILE_ASK = 0x80_0000; // with the former: whether it has changed is to be asked anew, it may not tell
export const POLL_PROGRESS = 0x20_0000; // segments of a frame were delivered, of one that is complete or not

// Guest segments: shared memory64 of 16 GiB each
export const SEGMENT_PAGES = 262_144; // of 64 KiB
/** Segments an end may have in the core variants that are built; the smallest that fits a link is used. */
export const SEGMENTS_MAX = 5;
