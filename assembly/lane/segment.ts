/**
 * Cutting a large TCP segment for a receiver that does not take it (RFC 793, 791, 8200): the frame's headers are read once into
 * memory 0, and each piece of its payload gets a copy of them with length, IPv4 id, sequence number, flags and
 * checksums of its own.
 */
import { HEADERS, HEADERS_BYTES_MAX } from "../../src/layout/lane.ts";
import { VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_TCPV4 } from "../../src/layout/virtio.ts";
import { checksumOf, fold, sumBytes, sumPieces } from "../checksum";
import { csumStart, gsoSize, gsoType } from "./offload";
import { loadPieces } from "./pieces";

// Ethernet and VLAN tags (IEEE 802.1Q)
const ETHERTYPE: usize = 12;
const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;
const ETHERTYPE_VLAN: u32 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u32 = 0x88a8;
const VLAN_TAGS_MAX: u32 = 2;
const VLAN_BYTES: u32 = 4;
/** What the length fields of IP can say. */
const IP_BYTES_MAX: u32 = 0xffff;
// IPv4
const IPV4_TOTAL_LENGTH: usize = 2;
const IPV4_ID: usize = 4;
const IPV4_PROTOCOL: usize = 9;
const IPV4_CHECKSUM: usize = 10;
const IPV4_ADDRESSES: usize = 12;
const IPV4_BYTES_MIN: u32 = 20;
// IPv6
const IPV6_PAYLOAD_LENGTH: usize = 4;
const IPV6_ADDRESSES: usize = 8;
const IPV6_BYTES: u32 = 40;
// TCP
const TCP: u32 = 6;
const TCP_SEQUENCE: usize = 4;
const TCP_DATA_OFFSET: usize = 12;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const TCP_BYTES_MIN: u32 = 20;
const TCP_FIN_PSH: u32 = 0x09;
const TCP_CWR: u32 = 0x80;

/** Of the frame being cut: how long its headers are, how many segments it makes. */
export let headersBytes: u32 = 0;
export let segments: u32 = 0;
/** Of the segment placed last: where its payload lies in the frame. */
export let payloadStart: u32 = 0;
export let payloadBytes: u32 = 0;

let isIpv4: bool = false;
let ip: u32 = 0; // where the IP header begins
let ipBytes: u32 = 0;
let frame: u32 = 0; // bytes of the whole
let ipId: u32 = 0;
let sequence: u32 = 0;
let tcpFlags: u32 = 0;
/** Sum of addresses and protocol. */
let pseudoSum: u64 = 0;

/** Reads the headers of the frame in SOURCE_PIECES. @returns false if they are not those of a TCP segment */
export function beginSegments(fromHeader: u32, frameBytes: u32): bool {
  const available = min<u32>(frameBytes, HEADERS_BYTES_MAX);
  for (let i: u32 = 0; i < available; i += 8) {
    const length = min<u32>(8, available - i);
    store<u64>(HEADERS + i, loadPieces(fromHeader + i, length));
  }
  if (csumStart + TCP_BYTES_MIN > available) return false;
  headersBytes = csumStart + ((<u32>load<u8>(HEADERS + csumStart + TCP_DATA_OFFSET) >> 4) << 2);
  if (headersBytes < csumStart + TCP_BYTES_MIN || headersBytes > available) return false;
  if (!findIp()) return false;

  const tcp = HEADERS + <usize>csumStart;
  frame = frameBytes;
  sequence = bswap<u32>(load<u32>(tcp, TCP_SEQUENCE));
  tcpFlags = load<u8>(tcp, TCP_FLAGS);
  ipId = bswap<u16>(load<u16>(HEADERS + <usize>ip, IPV4_ID));
  const addresses = HEADERS + <usize>ip + (isIpv4 ? IPV4_ADDRESSES : IPV6_ADDRESSES);
  pseudoSum = sumBytes(addresses, isIpv4 ? 8 : 32) + <u64>bswap<u16>(<u16>TCP);
  const payload = frameBytes - headersBytes;
  segments = max<u32>(1, (payload + gsoSize - 1) / gsoSize);
  return headersBytes - ip + min(payload, gsoSize) <= IP_BYTES_MAX;
}

/** Finds the payload of a segment: payloadStart, payloadBytes. @param number below `segments` */
export function placeSegment(number: u32): void {
  payloadStart = headersBytes + number * gsoSize;
  payloadBytes = min(gsoSize, frame - payloadStart);
}

/** Makes the headers of the segment that was placed, in HEADERS. */
export function makeSegment(number: u32, fromHeader: u32): void {
  const isLast = number + 1 == segments;

  const header = HEADERS + <usize>ip;
  const length = headersBytes - ip + payloadBytes;
  if (isIpv4) {
    store<u16>(header, bswap<u16>(<u16>length), IPV4_TOTAL_LENGTH);
    store<u16>(header, bswap<u16>(<u16>(ipId + number)), IPV4_ID);
    store<u16>(header, 0, IPV4_CHECKSUM);
    store<u16>(header, <u16>~fold(sumBytes(header, ipBytes)), IPV4_CHECKSUM);
  } else store<u16>(header, bswap<u16>(<u16>(length - IPV6_BYTES)), IPV6_PAYLOAD_LENGTH);

  const tcp = HEADERS + <usize>csumStart;
  const tcpBytes = headersBytes - csumStart;
  let flags = tcpFlags;
  if (!isLast) flags &= ~TCP_FIN_PSH;
  if (number != 0) flags &= ~TCP_CWR;
  store<u32>(tcp, bswap<u32>(sequence + number * gsoSize), TCP_SEQUENCE);
  store<u8>(tcp, <u8>flags, TCP_FLAGS);
  store<u16>(tcp, 0, TCP_CHECKSUM);
  const sum =
    pseudoSum +
    <u64>bswap<u16>(<u16>(tcpBytes + payloadBytes)) +
    sumBytes(tcp, tcpBytes) +
    sumPieces(fromHeader + payloadStart, payloadBytes);
  store<u16>(tcp, <u16>checksumOf(sum), TCP_CHECKSUM);
}

/** Finds the IP header: behind Ethernet and at most two VLAN tags, of the version that gso_type says, before the TCP header. */
function findIp(): bool {
  ip = ETHERTYPE + 2;
  let type = bswap<u16>(load<u16>(HEADERS + ETHERTYPE));
  for (let tags: u32 = 0; tags < VLAN_TAGS_MAX; ++tags) {
    if (type != ETHERTYPE_VLAN && type != ETHERTYPE_SERVICE_VLAN) break;
    type = bswap<u16>(load<u16>(HEADERS + <usize>ip + 2));
    ip += VLAN_BYTES;
  }
  isIpv4 = (gsoType & ~VIRTIO_NET_HDR_GSO_ECN) == VIRTIO_NET_HDR_GSO_TCPV4;
  if (type != (isIpv4 ? ETHERTYPE_IPV4 : ETHERTYPE_IPV6)) return false;
  const header = HEADERS + <usize>ip;
  if (!isIpv4) {
    // Extension headers may lie between; they are the same in all segments.
    ipBytes = IPV6_BYTES;
    return load<u8>(header) >> 4 == 6 && ip + ipBytes <= csumStart;
  }
  ipBytes = (<u32>load<u8>(header) & 0xf) << 2;
  if (load<u8>(header) >> 4 != 4 || ipBytes < IPV4_BYTES_MIN) return false;
  return ip + ipBytes == csumStart && load<u8>(header, IPV4_PROTOCOL) == TCP;
}
