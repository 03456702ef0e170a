/** A TAP interface and a packet socket on it, the other side: what either sends the other gets. tun(4), packet(7). */
import { closeSync, constants, existsSync, openSync, readSync, writeFileSync, writeSync } from "node:fs";
import { check, libc } from "../../native/libc.ts";

const TUNSETIFF = 0x400454ca;
const TUNSETVNETHDRSZ = 0x400454d8;
const IFF_TAP = 0x0002;
const IFF_NO_PI = 0x1000;
const IFF_VNET_HDR = 0x4000;
const SIOCSIFFLAGS = 0x8914;
const SIOCGIFINDEX = 0x8933;
const IFF_UP = 1;
// struct ifreq
const IFREQ_BYTES = 40;
const IFREQ_VALUE = 16;

const AF_INET = 2;
const AF_PACKET = 17;
const SOCK_DGRAM = 2;
const SOCK_RAW = 3;
const SOCK_NONBLOCK = 0o4000;
const SOL_PACKET = 263;
const PACKET_IGNORE_OUTGOING = 23;
/** Local experiments; the kernel does nothing with it. */
export const ETHERTYPE = 0x88b5;
export const ETH_HEADER_BYTES = 14;

const ioctl = libc.func("int ioctl(int fd, unsigned long request, void *argument)");
const socket = libc.func("int socket(int domain, int type, int protocol)");
const bind = libc.func("int bind(int fd, void *address, unsigned int length)");
const setsockopt = libc.func("int setsockopt(int fd, int level, int name, void *value, unsigned int length)");

/** Size of the vnet header before each frame on the TAP's side. */
export const VNET_BYTES = 12;

export class Wire implements Disposable {
  /** The TAP's only queue, non-blocking. */
  readonly tap: number;
  readonly #socket: number;

  constructor(name: string) {
    this.tap = openTap(name);
    const index = bringUp(name);
    this.#socket = openPacketSocket(index);
  }

  /** Puts a frame into the TAP queue. */
  send(frame: Uint8Array): void {
    writeSync(this.#socket, frame);
  }

  /** The next frame that was written to the TAP, or undefined. */
  receive(): Buffer | undefined {
    const frame = Buffer.alloc(65_536);
    try {
      return frame.subarray(0, readSync(this.#socket, frame));
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EAGAIN") return undefined;
      throw error;
    }
  }

  [Symbol.dispose](): void {
    closeSync(this.#socket);
    closeSync(this.tap);
  }
}

/** A frame that can be told from others. @param length with its header, at least 16 bytes */
export function makeFrame(number: number, length: number): Buffer {
  const frame = Buffer.alloc(length, number & 0xff);
  frame.fill(0xff, 0, 6);
  frame.writeUInt16BE(ETHERTYPE, 12);
  frame.writeUInt16BE(number, ETH_HEADER_BYTES);
  return frame;
}

/** Makes the interface, or attaches to it if it is there. */
export function openTap(name: string): number {
  const fd = openSync("/dev/net/tun", constants.O_RDWR | constants.O_NONBLOCK);
  const request = requestFor(name);
  request.writeUInt16LE(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, IFREQ_VALUE);
  try {
    check(ioctl(fd, TUNSETIFF, request), "ioctl", `TUNSETIFF ${name}`);
    check(ioctl(fd, TUNSETVNETHDRSZ, new Int32Array([VNET_BYTES])), "ioctl", "TUNSETVNETHDRSZ");
  } catch (error) {
    closeSync(fd);
    throw error;
  }
  return fd;
}

/** Silent: no IPv6, whose neighbour discovery speaks by itself. @returns the interface's index */
function bringUp(name: string): number {
  const ipv6 = `/proc/sys/net/ipv6/conf/${name}/disable_ipv6`;
  if (existsSync(ipv6)) writeFileSync(ipv6, "1");
  const control = check(socket(AF_INET, SOCK_DGRAM, 0), "socket", "for ioctls");
  const request = requestFor(name);
  check(ioctl(control, SIOCGIFINDEX, request), "ioctl", `SIOCGIFINDEX ${name}`);
  const index = request.readInt32LE(IFREQ_VALUE);
  request.fill(0, IFREQ_VALUE);
  request.writeUInt16LE(IFF_UP, IFREQ_VALUE);
  check(ioctl(control, SIOCSIFFLAGS, request), "ioctl", `SIOCSIFFLAGS ${name}`);
  closeSync(control);
  return index;
}

function openPacketSocket(index: number): number {
  const fd = check(socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, 0), "socket", "AF_PACKET");
  check(setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, new Int32Array([1]), 4), "setsockopt", "IGNORE_OUTGOING");
  // struct sockaddr_ll: family, protocol (big-endian), index
  const address = Buffer.alloc(20);
  address.writeUInt16LE(AF_PACKET, 0);
  address.writeUInt16BE(ETHERTYPE, 2);
  address.writeInt32LE(index, 4);
  check(bind(fd, address, address.length), "bind", `to interface ${index}`);
  return fd;
}

function requestFor(name: string): Buffer {
  const request = Buffer.alloc(IFREQ_BYTES);
  request.write(name, "latin1");
  return request;
}
