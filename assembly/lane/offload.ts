/**
 * Frames whose driver left work to the device (virtio 1.3, 5.1.6.2): a checksum to complete, a large TCP segment to cut.
 *
 * What the receiving driver takes too is handed on with the frame, checked; else the lane does the work, so that the two
 * drivers need not have negotiated the same. A header that asks for what its driver did not negotiate, or that makes no
 * sense, makes the frame a bad one. hdr_len is never trusted: it is written anew.
 */
import {
  DESTINATION_VRING,
  HEADERS,
  OFFLOAD_CSUM,
  OFFLOAD_ECN,
  OFFLOAD_TSO4,
  OFFLOAD_TSO6,
  SOURCE_VRING,
  VRING_OFFLOADS,
} from "../../src/layout/lane.ts";
import {
  VIRTIO_NET_HDR_F_NEEDS_CSUM,
  VIRTIO_NET_HDR_GSO_ECN,
  VIRTIO_NET_HDR_GSO_TCPV4,
  VIRTIO_NET_HDR_GSO_TCPV6,
} from "../../src/layout/virtio.ts";
import { checksumOf, sumPieces } from "../checksum";
import { headerOf } from "../net-header";
import { loadPieces, storePieces } from "./pieces";

export const OFFLOAD_NONE: u32 = 0;
/** The header to deliver says it all: deliveredWord, deliveredCsumOffset. */
export const OFFLOAD_PASS: u32 = 1;
/** The checksum is to be completed: completeChecksum(). */
export const OFFLOAD_SUM: u32 = 2;
/** The frame is to be cut: segment.ts. */
export const OFFLOAD_SEGMENT: u32 = 3;
export const OFFLOAD_BAD: u32 = 4;

/** The header that goes with the frame; num_buffers comes later. */
export let deliveredWord: u64 = 0;
export let deliveredCsumOffset: u32 = 0;

// Of the frame judged last
export let gsoType: u32 = 0;
export let gsoSize: u32 = 0;
export let csumStart: u32 = 0;
export let csumOffset: u32 = 0;

const ETHERNET_BYTES: u32 = 14;
const TCP_BYTES_MIN: u32 = 20;
const TCP_DATA_OFFSET: u32 = 12;
const TCP_CHECKSUM: u32 = 16;
/** The least that Linux lets a segment carry: 48 bytes with 40 of options. Less would make ever more segments of a frame. */
const GSO_SIZE_MIN: u32 = 8;

/** A frame that asks for nothing. */
export function noOffload(): void {
  deliveredWord = 0;
  deliveredCsumOffset = 0;
}

/** Whether a frame asks for its checksum only, and rightly; that can be handed on to a driver that takes it. */
export function passesChecksum(word: u64, offset: u32, frameBytes: u32): bool {
  return (word & 0xffff) == VIRTIO_NET_HDR_F_NEEDS_CSUM && isChecksumInside(<u32>(word >> 48), offset, frameBytes);
}

/** The word of the header that goes with it. */
export function passedChecksum(word: u64): u64 {
  return headerOf(VIRTIO_NET_HDR_F_NEEDS_CSUM, 0, 0, 0, <u32>(word >> 48));
}

/**
 * Decides what becomes of a frame whose header asks for an offload. The frame is in SOURCE_PIECES.
 * @param headerBytes of the virtio-net header before it
 */
export function judgeOffload(word: u64, offset: u32, headerBytes: u32, frameBytes: u32): u32 {
  const asked = load<u32>(SOURCE_VRING, VRING_OFFLOADS);
  const taken = load<u32>(DESTINATION_VRING, VRING_OFFLOADS);
  // Flags that mean nothing here are ignored (5.1.6.2.2).
  const needsChecksum = (<u32>word & VIRTIO_NET_HDR_F_NEEDS_CSUM) != 0;
  gsoType = <u32>(word >> 8) & 0xff;
  gsoSize = <u32>(word >> 32) & 0xffff;
  csumStart = <u32>(word >> 48);
  csumOffset = offset;
  noOffload();
  if (!needsChecksum) return gsoType ? OFFLOAD_BAD : OFFLOAD_PASS;
  if (!(asked & OFFLOAD_CSUM) || !isChecksumInside(csumStart, csumOffset, frameBytes)) return OFFLOAD_BAD;

  if (gsoType) {
    const needed = offloadsOf(gsoType);
    if (needed == 0 || (asked & needed) != needed) return OFFLOAD_BAD;
    if (gsoSize < GSO_SIZE_MIN || csumOffset != TCP_CHECKSUM) return OFFLOAD_BAD;
    if (csumStart + TCP_BYTES_MIN > frameBytes) return OFFLOAD_BAD;
    if ((taken & (needed | OFFLOAD_CSUM)) != (needed | OFFLOAD_CSUM)) return OFFLOAD_SEGMENT;
    const tcpBytes = (<u32>loadPieces(headerBytes + csumStart + TCP_DATA_OFFSET, 1) >> 4) << 2;
    const headers = csumStart + tcpBytes;
    if (tcpBytes < TCP_BYTES_MIN || headers > frameBytes) return OFFLOAD_BAD;
    // What fits one segment is none: the kernel of the receiver would find fault with it.
    const isLarge = frameBytes - headers > gsoSize;
    deliveredWord = isLarge
      ? headerOf(VIRTIO_NET_HDR_F_NEEDS_CSUM, gsoType, headers, gsoSize, csumStart)
      : passedChecksum(word);
    deliveredCsumOffset = csumOffset;
    return OFFLOAD_PASS;
  }
  if (!(taken & OFFLOAD_CSUM)) return OFFLOAD_SUM;
  deliveredWord = passedChecksum(word);
  deliveredCsumOffset = csumOffset;
  return OFFLOAD_PASS;
}

/** Sums the frame in SOURCE_PIECES from csum_start on and stores the checksum in its copy in DESTINATION_PIECES. */
export function completeChecksum(fromHeader: u32, toHeader: u32, frameBytes: u32): void {
  const checksum = checksumOf(sumPieces(fromHeader + csumStart, frameBytes - csumStart));
  store<u16>(HEADERS, <u16>checksum);
  storePieces(toHeader + csumStart + csumOffset, HEADERS, 2);
}

/** The checksum field lies behind the Ethernet header, inside the frame. */
function isChecksumInside(start: u32, offset: u32, frameBytes: u32): bool {
  return start >= ETHERNET_BYTES && start + offset + 2 <= frameBytes;
}

/** OFFLOAD_* that a gso_type takes; 0: it is unknown. */
function offloadsOf(type: u32): u32 {
  const ecn: u32 = type & VIRTIO_NET_HDR_GSO_ECN ? OFFLOAD_ECN : 0;
  const plain = type & ~VIRTIO_NET_HDR_GSO_ECN;
  if (plain == VIRTIO_NET_HDR_GSO_TCPV4) return OFFLOAD_TSO4 | ecn;
  return plain == VIRTIO_NET_HDR_GSO_TCPV6 ? OFFLOAD_TSO6 | ecn : 0;
}
