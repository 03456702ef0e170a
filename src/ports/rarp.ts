/**
 * The frame that tells a network where a guest is now: a reverse ARP request (RFC 903) in which it asks for itself, as QEMU
 * sends it after a migration. Switches learn the way to its address from it.
 */
const FRAME_BYTES = 60;
const MAC_BYTES = 6;
const ETHERTYPE_RARP = 0x8035;
const HARDWARE_ETHERNET = 1;
const PROTOCOL_IPV4 = 0x0800;
const IPV4_BYTES = 4;
const REVERSE_REQUEST = 3;

// struct ethhdr, then struct arphdr and its addresses
const DESTINATION = 0;
const SOURCE = 6;
const ETHERTYPE = 12;
const HARDWARE = 14;
const PROTOCOL = 16;
const HARDWARE_LENGTH = 18;
const PROTOCOL_LENGTH = 19;
const OPERATION = 20;
const SENDER = 22;
const TARGET = 32;

/** A whole frame without its checksum, padded to the shortest that Ethernet has. */
export function rarpFrame(mac: Uint8Array): Uint8Array {
  const frame = new Uint8Array(FRAME_BYTES);
  const view = new DataView(frame.buffer);
  frame.fill(0xff, DESTINATION, DESTINATION + MAC_BYTES);
  for (const at of [SOURCE, SENDER, TARGET]) frame.set(mac, at);
  view.setUint16(ETHERTYPE, ETHERTYPE_RARP);
  view.setUint16(HARDWARE, HARDWARE_ETHERNET);
  view.setUint16(PROTOCOL, PROTOCOL_IPV4);
  view.setUint8(HARDWARE_LENGTH, MAC_BYTES);
  view.setUint8(PROTOCOL_LENGTH, IPV4_BYTES);
  view.setUint16(OPERATION, REVERSE_REQUEST);
  return frame;
}
