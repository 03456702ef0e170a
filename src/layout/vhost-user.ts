/**
 * vhost-user numbers: request ids, protocol feature bits, header and payload layouts, limits.
 *
 * Truth: QEMU docs/interop/vhost-user.rst. Everything is host-endian (little-endian on the hosts this runs on) and
 * packed. Plain constants only: asc, tsc, Node and vitest import this same file.
 */

// struct vhost_user_header: u32 request, u32 flags, u32 size
export const HEADER_SIZE = 12;
export const HEADER_REQUEST = 0;
export const HEADER_FLAGS = 4;
export const HEADER_PAYLOAD_SIZE = 8;

export const VHOST_USER_VERSION = 1;
export const VHOST_USER_VERSION_MASK = 3;
export const VHOST_USER_REPLY = 4;
export const VHOST_USER_NEED_REPLY = 8;

// Limits: our own largest payload (the specification's largest is 2056 bytes), regions of a SET_MEM_TABLE,
// regions added one by one, size of the configuration space
export const PAYLOAD_SIZE_MAX = 4084;
export const MEM_REGIONS_MAX = 8;
export const MEM_SLOTS_MAX = 509;
export const CONFIG_SIZE_MAX = 256;

// Front-end requests
export const VHOST_USER_GET_FEATURES = 1;
export const VHOST_USER_SET_FEATURES = 2;
export const VHOST_USER_SET_OWNER = 3;
export const VHOST_USER_RESET_OWNER = 4;
export const VHOST_USER_SET_MEM_TABLE = 5;
export const VHOST_USER_SET_LOG_BASE = 6;
export const VHOST_USER_SET_LOG_FD = 7;
export const VHOST_USER_SET_VRING_NUM = 8;
export const VHOST_USER_SET_VRING_ADDR = 9;
export const VHOST_USER_SET_VRING_BASE = 10;
export const VHOST_USER_GET_VRING_BASE = 11;
export const VHOST_USER_SET_VRING_KICK = 12;
export const VHOST_USER_SET_VRING_CALL = 13;
export const VHOST_USER_SET_VRING_ERR = 14;
export const VHOST_USER_GET_PROTOCOL_FEATURES = 15;
export const VHOST_USER_SET_PROTOCOL_FEATURES = 16;
export const VHOST_USER_GET_QUEUE_NUM = 17;
export const VHOST_USER_SET_VRING_ENABLE = 18;
export const VHOST_USER_SEND_RARP = 19;
export const VHOST_USER_NET_SET_MTU = 20;
export const VHOST_USER_SET_BACKEND_REQ_FD = 21;
export const VHOST_USER_IOTLB_MSG = 22;
export const VHOST_USER_SET_VRING_ENDIAN = 23;
export const VHOST_USER_GET_CONFIG = 24;
export const VHOST_USER_SET_CONFIG = 25;
export const VHOST_USER_CREATE_CRYPTO_SESSION = 26;
export const VHOST_USER_CLOSE_CRYPTO_SESSION = 27;
export const VHOST_USER_POSTCOPY_ADVISE = 28;
export const VHOST_USER_POSTCOPY_LISTEN = 29;
export const VHOST_USER_POSTCOPY_END = 30;
export const VHOST_USER_GET_INFLIGHT_FD = 31;
export const VHOST_USER_SET_INFLIGHT_FD = 32;
export const VHOST_USER_GPU_SET_SOCKET = 33;
export const VHOST_USER_RESET_DEVICE = 34;
export const VHOST_USER_VRING_KICK = 35;
export const VHOST_USER_GET_MAX_MEM_SLOTS = 36;
export const VHOST_USER_ADD_MEM_REG = 37;
export const VHOST_USER_REM_MEM_REG = 38;
export const VHOST_USER_SET_STATUS = 39;
export const VHOST_USER_GET_STATUS = 40;
export const VHOST_USER_GET_SHARED_OBJECT = 41;
export const VHOST_USER_SET_DEVICE_STATE_FD = 42;
export const VHOST_USER_CHECK_DEVICE_STATE = 43;
export const VHOST_USER_GET_SHMEM_CONFIG = 44;
export const VHOST_USER_GET_VRING_BASE_SKIP_DRAIN = 45;

// Protocol feature bit numbers
export const VHOST_USER_PROTOCOL_F_MQ = 0;
export const VHOST_USER_PROTOCOL_F_RARP = 2;
export const VHOST_USER_PROTOCOL_F_REPLY_ACK = 3;
export const VHOST_USER_PROTOCOL_F_MTU = 4;
export const VHOST_USER_PROTOCOL_F_BACKEND_REQ = 5;
export const VHOST_USER_PROTOCOL_F_CONFIG = 9;
export const VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD = 12;
export const VHOST_USER_PROTOCOL_F_RESET_DEVICE = 13;
export const VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS = 14;
export const VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 15;
export const VHOST_USER_PROTOCOL_F_STATUS = 16;
export const VHOST_USER_PROTOCOL_F_DEVICE_STATE = 19;
export const VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT = 20;
export const VHOST_USER_PROTOCOL_F_GPA_ADDRESSES = 21;
export const VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN = 23;

export const U64_SIZE = 8;

// struct vhost_vring_state: u32 index, u32 num
export const VRING_STATE_SIZE = 8;
export const VRING_STATE_INDEX = 0;
export const VRING_STATE_NUM = 4;

// struct vhost_vring_addr: u32 index, u32 flags, u64 desc, u64 used, u64 avail, u64 log; used comes before avail
export const VRING_ADDR_SIZE = 40;
export const VRING_ADDR_INDEX = 0;
export const VRING_ADDR_FLAGS = 4;
export const VRING_ADDR_DESC = 8;
export const VRING_ADDR_USED = 16;
export const VRING_ADDR_AVAIL = 24;
export const VRING_ADDR_LOG = 32;

// The u64 of SET_VRING_KICK, CALL and ERR: bits 0-7 index, bit 8 "no fd"
export const VHOST_USER_VRING_IDX_MASK = 0xff;
export const VHOST_USER_VRING_NOFD_MASK = 0x100;

// Memory table: u32 count, u32 padding, then regions of u64 gpa, u64 size, u64 user address, u64 mmap offset
export const MEM_TABLE_HEADER_SIZE = 8;
export const MEM_TABLE_COUNT = 0;
export const MEM_REGION_SIZE = 32;
export const MEM_REGION_GPA = 0;
export const MEM_REGION_BYTES = 8;
export const MEM_REGION_USER_ADDRESS = 16;
export const MEM_REGION_MMAP_OFFSET = 24;

// The payload of ADD_MEM_REG and REM_MEM_REG: u64 padding, then a region
export const SINGLE_REGION_SIZE = 40;
export const SINGLE_REGION = 8;

// The payload of GET_CONFIG and SET_CONFIG: u32 offset, u32 size, u32 flags, then `size` bytes
export const CONFIG_HEADER_SIZE = 12;
export const CONFIG_OFFSET = 0;
export const CONFIG_SIZE = 4;

// The payload of SET_DEVICE_STATE_FD: u32 direction, u32 phase. Its reply: bits 0-7 an error, bit 8 "no fd"
export const DEVICE_STATE_SIZE = 8;
export const DEVICE_STATE_DIRECTION = 0;
export const DEVICE_STATE_PHASE = 4;
export const DEVICE_STATE_SAVE = 0;
export const DEVICE_STATE_LOAD = 1;
export const DEVICE_STATE_PHASE_STOPPED = 0;
export const DEVICE_STATE_NOFD = 0x100;

// The payload of SEND_RARP: a MAC address in the first bytes of a u64
export const MAC_SIZE = 6;

// The payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD: u64 mmap size, u64 mmap offset, u16 queues, u16 queue size, padding
export const INFLIGHT_SIZE = 24;
export const INFLIGHT_MMAP_SIZE = 0;
export const INFLIGHT_MMAP_OFFSET = 8;
export const INFLIGHT_QUEUES = 16;
export const INFLIGHT_QUEUE_SIZE = 18;
// Each queue has its part of the inflight region, a multiple of this long; the mmap offset is one of a page
export const INFLIGHT_ALIGN = 64;
export const INFLIGHT_OFFSET_ALIGN = 4096;

// A queue's part: u64 features, u16 version, u16 desc_num, then by the form of the ring
export const INFLIGHT_FEATURES = 0;
export const INFLIGHT_VERSION = 8;
export const INFLIGHT_DESC_NUM = 10;
export const INFLIGHT_VERSION_1 = 1;
// Split: u16 last_batch_head, u16 used_idx, then entries of u8 inflight, u8 padding[5], u16 next, u64 counter
export const INFLIGHT_SPLIT_LAST_BATCH_HEAD = 12;
export const INFLIGHT_SPLIT_USED_IDX = 14;
export const INFLIGHT_SPLIT_ENTRIES = 16;
export const INFLIGHT_SPLIT_ENTRY_SIZE = 16;
export const INFLIGHT_SPLIT_NEXT = 6;
export const INFLIGHT_SPLIT_COUNTER = 8;
// Packed: u16 free_head, u16 old_free_head, u16 used_idx, u16 old_used_idx, u8 used_wrap, u8 old_used_wrap, padding, then
// entries of u8 inflight, u8 padding, u16 next, u16 last, u16 num, u64 counter, u16 id, u16 flags, u32 len, u64 addr
export const INFLIGHT_PACKED_FREE_HEAD = 12;
export const INFLIGHT_PACKED_OLD_FREE_HEAD = 14;
export const INFLIGHT_PACKED_USED_IDX = 16;
export const INFLIGHT_PACKED_OLD_USED_IDX = 18;
export const INFLIGHT_PACKED_USED_WRAP = 20;
export const INFLIGHT_PACKED_OLD_USED_WRAP = 21;
export const INFLIGHT_PACKED_ENTRIES = 32;
export const INFLIGHT_PACKED_ENTRY_SIZE = 32;
export const INFLIGHT_PACKED_NEXT = 2;
export const INFLIGHT_PACKED_LAST = 4;
export const INFLIGHT_PACKED_NUM = 6;
export const INFLIGHT_PACKED_COUNTER = 8;
export const INFLIGHT_PACKED_ID = 16;
// Of either entry
export const INFLIGHT_ENTRY_INFLIGHT = 0;
