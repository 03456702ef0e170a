/**
 * Virtio numbers: the split and the packed virtqueue, the virtio-net header and feature bits.
 *
 * Truth: virtio 1.3, sections 2.7 (split virtqueues), 2.8 (packed virtqueues), 5.1.6 (net header), 6 (features);
 * linux/virtio_ring.h, linux/virtio_net.h, linux/virtio_config.h. test/layout compares every number here
 * with the kernel's headers. Plain constants only: asc, tsc, Node and vitest import this same file.
 */

// struct vring_desc: le64 addr, le32 len, le16 flags, le16 next
export const DESC_SIZE = 16;
export const DESC_ADDR = 0;
export const DESC_LEN = 8;
export const DESC_FLAGS = 12;

export const VRING_DESC_F_NEXT = 1;
export const VRING_DESC_F_WRITE = 2;
export const VRING_DESC_F_INDIRECT = 4;

// struct vring_avail: le16 flags, le16 idx, le16 ring[size], le16 used_event
export const AVAIL_FLAGS = 0;
export const AVAIL_IDX = 2;
export const AVAIL_RING = 4;
export const AVAIL_ENTRY_SIZE = 2;
export const VRING_AVAIL_F_NO_INTERRUPT = 1;

// struct vring_used: le16 flags, le16 idx, struct { le32 id, le32 len } ring[size], le16 avail_event
export const USED_FLAGS = 0;
export const USED_IDX = 2;
export const USED_RING = 4;
export const USED_ENTRY_SIZE = 8;
export const USED_ENTRY_ID = 0;
export const USED_ENTRY_LEN = 4;
export const VRING_USED_F_NO_NOTIFY = 1;

// Alignment of the three areas, in bytes (virtio 1.3, 2.7)
export const DESC_ALIGN = 16;
export const AVAIL_ALIGN = 2;
export const USED_ALIGN = 4;
export const VRING_SIZE_MAX = 32768;

// struct vring_packed_desc: le64 addr, le32 len, le16 id, le16 flags; as large as a vring_desc
export const PACKED_DESC_LEN = 8;
export const PACKED_DESC_ID = 12;
export const PACKED_DESC_FLAGS = 14;
// Bit numbers in its flags, beside VRING_DESC_F_*
export const VRING_PACKED_DESC_F_AVAIL = 7;
export const VRING_PACKED_DESC_F_USED = 15;

// struct vring_packed_desc_event: le16 off_wrap, le16 flags; one of the driver's and one of the device's
export const PACKED_EVENT_OFF_WRAP = 0;
export const PACKED_EVENT_FLAGS = 2;
export const PACKED_EVENT_SIZE = 4;
export const PACKED_EVENT_ALIGN = 4;
export const VRING_PACKED_EVENT_FLAG_ENABLE = 0;
export const VRING_PACKED_EVENT_FLAG_DISABLE = 1;
export const VRING_PACKED_EVENT_FLAG_DESC = 2;
// Bit number of the wrap counter in off_wrap and in every position of a packed ring: index | wrap << 15
export const VRING_PACKED_EVENT_F_WRAP_CTR = 15;

// struct virtio_net_hdr_mrg_rxbuf
export const NET_HDR_NUM_BUFFERS = 10;
export const NET_HDR_SIZE_LEGACY = 10; // neither VERSION_1 nor MRG_RXBUF
export const NET_HDR_SIZE = 12;
export const NET_HDR_FLAGS = 0;
export const NET_HDR_GSO_TYPE = 1;
export const NET_HDR_HDR_LEN = 2;
export const NET_HDR_GSO_SIZE = 4;
export const NET_HDR_CSUM_START = 6;
export const NET_HDR_CSUM_OFFSET = 8;
export const VIRTIO_NET_HDR_F_NEEDS_CSUM = 1;
export const VIRTIO_NET_HDR_F_DATA_VALID = 2;
export const VIRTIO_NET_HDR_GSO_NONE = 0;
export const VIRTIO_NET_HDR_GSO_TCPV4 = 1;
export const VIRTIO_NET_HDR_GSO_TCPV6 = 4;
export const VIRTIO_NET_HDR_GSO_ECN = 128;

// Feature bit numbers (not masks: they pass 2^31)
export const VIRTIO_NET_F_CSUM = 0;
export const VIRTIO_NET_F_GUEST_CSUM = 1;
export const VIRTIO_NET_F_MTU = 3;
export const VIRTIO_NET_F_MAC = 5;
export const VIRTIO_NET_F_GUEST_TSO4 = 7;
export const VIRTIO_NET_F_GUEST_TSO6 = 8;
export const VIRTIO_NET_F_GUEST_ECN = 9;
export const VIRTIO_NET_F_HOST_TSO4 = 11;
export const VIRTIO_NET_F_HOST_TSO6 = 12;
export const VIRTIO_NET_F_HOST_ECN = 13;
export const VIRTIO_NET_F_MRG_RXBUF = 15;
export const VIRTIO_NET_F_STATUS = 16;
export const VIRTIO_NET_F_GUEST_ANNOUNCE = 21;
export const VIRTIO_NET_F_MQ = 22;
export const VIRTIO_F_ANY_LAYOUT = 27;
export const VIRTIO_RING_F_INDIRECT_DESC = 28;
export const VIRTIO_RING_F_EVENT_IDX = 29;
export const VHOST_USER_F_PROTOCOL_FEATURES = 30;
export const VIRTIO_F_VERSION_1 = 32;
export const VIRTIO_F_RING_PACKED = 34;
export const VIRTIO_F_IN_ORDER = 35;
export const VIRTIO_F_RING_RESET = 40;
export const VIRTIO_NET_F_GUEST_USO4 = 54;
export const VIRTIO_NET_F_GUEST_USO6 = 55;
export const VIRTIO_NET_F_HOST_USO = 56;

// struct virtio_net_config: u8 mac[6], le16 status, le16 max_virtqueue_pairs, le16 mtu, then fields that are not served
export const NET_CONFIG_MAC = 0;
export const NET_CONFIG_STATUS = 6;
export const NET_CONFIG_MAX_VIRTQUEUE_PAIRS = 8;
export const NET_CONFIG_MTU = 10;
export const NET_CONFIG_SIZE = 12;
export const VIRTIO_NET_S_LINK_UP = 1;
// MTU of an Ethernet device: the least that IPv4 asks for, and what fits the field
export const MTU_MIN = 68;
export const MTU_MAX = 65535;

// Device status bits
export const VIRTIO_CONFIG_S_FEATURES_OK = 8;

// Virtqueue indexes of pair n: receiveq 2n, transmitq 2n + 1 (virtio 1.3, 5.1.2)
export const RECEIVEQ = 0;
export const TRANSMITQ = 1;
