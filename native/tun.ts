/**
 * Queues of TAP interfaces: /dev/net/tun. Truth: linux/if_tun.h, drivers/net/tun.c, Documentation/networking/tuntap.rst.
 *
 * A fd is one queue. A read takes one frame from the interface, a write gives it one; both begin with a net header of
 * NET_HDR_SIZE bytes. Main thread; pollers read and write the fds.
 */
import { ConfigError, type SystemError } from "../src/errors.ts";
import {
  BPF_RET_K,
  ETH_ALEN,
  IFF_ATTACH_QUEUE,
  IFF_DETACH_QUEUE,
  IFF_MULTI_QUEUE,
  IFF_NO_PI,
  IFF_TAP,
  IFF_VNET_HDR,
  IFNAMSIZ,
  IFREQ_FLAGS,
  IFREQ_HWADDR,
  IFREQ_SIZE,
  SIOCGIFHWADDR,
  SOCK_FILTER_SIZE,
  SOCK_FPROG_FILTER,
  SOCK_FPROG_SIZE,
  TUNATTACHFILTER,
  TUNDETACHFILTER,
  TUNGETIFF,
  TUNSETIFF,
  TUNSETOFFLOAD,
  TUNSETQUEUE,
  TUNSETVNETHDRSZ,
} from "../src/layout/tun.ts";
import { NET_HDR_SIZE } from "../src/layout/virtio.ts";
import koffi from "koffi";
import { setCloseOnExec, setNonBlocking } from "./fd.ts";
import { check, close, libc, systemError } from "./libc.ts";
import { findInterface } from "./network-interface.ts";

const DEVICE = "/dev/net/tun";
const O_RDWR = 2;
const O_NONBLOCK = 0o4000;
const O_CLOEXEC = 0o2000000;
const { EPERM, EACCES, ENOENT, ENODEV, EBUSY, EINVAL, E2BIG, EBADF, EBADFD } = koffi.os.errno as Record<string, number>;
/** A queue holds as many frames as the interface's txqueuelen, 1000 by default. */
const PURGE_FRAMES_MAX = 65536;

const open = libc.func("int open(const char *path, int flags)");
const ioctl = libc.func("int ioctl(int fd, unsigned long request, void *argument)");
const ioctlValue = libc.func("int ioctl(int fd, unsigned long request, unsigned long argument)");
const read = libc.func("int64_t read(int fd, void *bytes, size_t length)");
const write = libc.func("int64_t write(int fd, void *bytes, size_t length)");

/** Open queues of one TAP interface, all of them attached. */
export interface TapQueues {
  name: string;
  /** Hardware address, as 52:54:00:12:34:56. */
  address: string;
  fds: number[];
  /** Its queues can be detached. */
  isMultiQueue: boolean;
}

/**
 * Opens queues of the TAP interface `name`, which is created if there is none; without a name the kernel finds one.
 * What is created disappears with its last queue. Frames wait in the queues from the first moment, see setAttached() and setDeaf().
 * @throws SystemError EPERM, EBUSY, EINVAL, E2BIG; ENOENT, EACCES: of /dev/net/tun. Nothing is left open.
 */
export function openTap(name: string | undefined, count: number): TapQueues {
  const others = name === undefined ? 0 : (findInterface(name)?.tun?.queues ?? 0);
  if (others > 0) throw openError(name, count, EBUSY);
  const flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
  const tap: TapQueues = { name: name ?? "", address: "", fds: [], isMultiQueue: true };
  try {
    for (let i = 0; i < count; i++) {
      const fd = openDevice();
      tap.fds.push(fd);
      const request = interfaceRequest(tap.name, flags);
      let result = ioctl(fd, TUNSETIFF, request) as number;
      if (result < 0 && errnoIs(EINVAL) && count === 1) {
        // Made without multi_queue, it has one queue; that is enough.
        request.writeUInt16LE(flags & ~IFF_MULTI_QUEUE, IFREQ_FLAGS);
        result = ioctl(fd, TUNSETIFF, request) as number;
        tap.isMultiQueue = false;
      }
      if (result < 0) throw openError(name, count);
      tap.name = nameIn(request);
    }
    tap.fds.forEach(setHeaderSize);
    tap.address = addressOf(tap.fds[0] as number);
    return tap;
  } catch (error) {
    tap.fds.forEach(close);
    throw error;
  }
}

/**
 * Takes over queues that somebody else opened, all of one interface: makes them non-blocking and close-on-exec.
 * @throws ConfigError if a fd is no such queue; then they are still the caller's
 */
export function adoptTap(fds: readonly number[]): TapQueues {
  const [first, ...more] = fds.map(interfaceOf);
  if (!first) throw new ConfigError("no fd was given");
  const other = more.find(({ name }) => name !== first.name);
  if (other) {
    throw new ConfigError(
      `fds ${fds.join(", ")} are of two interfaces, ${first.name} and ${other.name}; pass one's only`,
    );
  }
  for (const fd of fds) {
    setNonBlocking(fd);
    setCloseOnExec(fd);
    setHeaderSize(fd);
  }
  return { ...first, address: addressOf(fds[0] as number), fds: [...fds] };
}

/**
 * Attaches or detaches a queue of an interface with multi_queue. A detached queue is empty and gets no frames; its fd takes
 * frames and requests as before.
 * @throws SystemError EINVAL: it is so already, the interface is gone, or has no multi_queue; E2BIG
 */
export function setAttached(fd: number, isAttached: boolean): void {
  const request = interfaceRequest("", isAttached ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE);
  const context = `${isAttached ? "attaching" : "detaching"} the queue of fd ${fd}`;
  check(ioctl(fd, TUNSETQUEUE, request), "TUNSETQUEUE", context);
}

// struct sock_fprog, and behind it its one struct sock_filter: keep 0 bytes of any frame
const dropFilter = Buffer.from(new ArrayBuffer(SOCK_FPROG_SIZE + SOCK_FILTER_SIZE));
dropFilter.writeUInt16LE(1, 0);
dropFilter.writeBigUInt64LE(koffi.address(dropFilter) + BigInt(SOCK_FPROG_SIZE), SOCK_FPROG_FILTER);
dropFilter.writeUInt16LE(BPF_RET_K, SOCK_FPROG_SIZE);

/**
 * Makes an interface without multi_queue drop what it would queue, or stop that: the detaching of the one queue that cannot be
 * detached. Writes go on. Its queue is empty afterwards, both ways.
 */
export function setDeaf(fd: number, isDeaf: boolean): void {
  // An interface that has no filters (macvtap) is purged at least.
  if (isDeaf) ioctl(fd, TUNATTACHFILTER, dropFilter);
  purge(fd);
  if (!isDeaf) ioctl(fd, TUNDETACHFILTER, null);
}

/**
 * Says what the reader of the queues takes (TUN_F_*), for the whole interface. What is queued already stays as it is.
 * @throws SystemError EINVAL: one of them is unknown to this kernel, or needs another one; EBADFD: the interface is gone
 */
export function setOffloads(fd: number, offloads: number): void {
  const context = `setting the offloads of the interface of fd ${fd} to 0x${offloads.toString(16)}`;
  check(ioctlValue(fd, TUNSETOFFLOAD, offloads), "TUNSETOFFLOAD", context);
}

/** Gives the interface a frame without any offload. @returns whether it was taken: not if it is down */
export function writeFrame(fd: number, frame: Uint8Array): boolean {
  const bytes = new Uint8Array(NET_HDR_SIZE + frame.length);
  bytes.set(frame, NET_HDR_SIZE);
  return Number(write(fd, bytes, bytes.length)) === bytes.length;
}

/** Reads away what is queued. */
function purge(fd: number): void {
  const bytes = Buffer.alloc(NET_HDR_SIZE);
  for (let i = 0; i < PURGE_FRAMES_MAX && Number(read(fd, bytes, bytes.length)) >= 0; i++);
}

function addressOf(fd: number): string {
  const request = Buffer.alloc(IFREQ_SIZE);
  check(ioctl(fd, SIOCGIFHWADDR, request), "SIOCGIFHWADDR", `reading the address of the interface of fd ${fd}`);
  const bytes = request.subarray(IFREQ_HWADDR, IFREQ_HWADDR + ETH_ALEN);
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(":");
}

function setHeaderSize(fd: number): void {
  const size = Buffer.alloc(4);
  size.writeInt32LE(NET_HDR_SIZE);
  check(
    ioctl(fd, TUNSETVNETHDRSZ, size),
    "TUNSETVNETHDRSZ",
    `setting the net header of fd ${fd} to ${NET_HDR_SIZE} bytes`,
  );
}

/** Attaches the queue, if it was detached. @throws ConfigError if the fd is no queue that the relay can use */
function interfaceOf(fd: number): { name: string; isMultiQueue: boolean } {
  const request = Buffer.alloc(IFREQ_SIZE);
  if (ioctl(fd, TUNGETIFF, request) < 0) {
    if (errnoIs(EBADF)) throw new ConfigError(`fd ${fd} is not open; was it passed on to this process?`);
    if (errnoIs(EBADFD)) throw new ConfigError(`fd ${fd} is of no interface (any more); TUNSETIFF gives it one`);
    throw new ConfigError(`fd ${fd} is no TAP interface; pass one that was opened from ${DEVICE}`);
  }
  const flags = request.readUInt16LE(IFREQ_FLAGS);
  const name = nameIn(request);
  if ((flags & IFF_TAP) === 0)
    throw new ConfigError(`fd ${fd}: ${name} is a TUN interface; it must be TAP, opened with IFF_TAP`);
  if ((flags & IFF_DETACH_QUEUE) !== 0) setAttached(fd, true);
  if (!hasNoPacketInfo(fd) || (flags & IFF_VNET_HDR) === 0)
    throw new ConfigError(`fd ${fd}: ${name} must be opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`);
  return { name, isMultiQueue: (flags & IFF_MULTI_QUEUE) !== 0 };
}

/**
 * Whether it was opened with IFF_NO_PI. TUNGETIFF says so if there is a filter only: without one the same bit says that
 * (IFF_NOFILTER). Leaves no filter, not even one of those who had the queue before.
 */
function hasNoPacketInfo(fd: number): boolean {
  const request = Buffer.alloc(IFREQ_SIZE);
  ioctl(fd, TUNATTACHFILTER, dropFilter);
  ioctl(fd, TUNGETIFF, request);
  ioctl(fd, TUNDETACHFILTER, null);
  return (request.readUInt16LE(IFREQ_FLAGS) & IFF_NO_PI) !== 0;
}

function openDevice(): number {
  const fd = open(DEVICE, O_RDWR | O_NONBLOCK | O_CLOEXEC) as number;
  if (fd >= 0) return fd;
  let fix = "";
  if (errnoIs(ENOENT) || errnoIs(ENODEV))
    fix = "; load the module (modprobe tun), give a container --device=/dev/net/tun";
  if (errnoIs(EACCES) || errnoIs(EPERM)) fix = "; let this user (or container) read and write it, or pass tap:fd=N";
  throw systemError("open", `opening ${DEVICE}${fix}`);
}

/** Why TUNSETIFF failed, and what helps. */
function openError(name: string | undefined, count: number, number = koffi.errno()): SystemError {
  const found = name === undefined ? undefined : findInterface(name);
  const what = `opening ${count === 1 ? "a queue" : `${count} queues`} of ${name ?? "a new TAP interface"}`;
  const because = (reason: string) => systemError("TUNSETIFF", `${what}; ${reason}`, number);
  const add = `ip tuntap add dev ${name ?? "tap0"} mode tap multi_queue vnet_hdr user ${process.geteuid?.()}`;
  switch (number) {
    case EPERM:
      return because(
        found
          ? `it is not this user's: have root delete it and do "${add}", run with CAP_NET_ADMIN, or pass tap:fd=N`
          : `to create it takes CAP_NET_ADMIN: run with it, have root do "${add}" before, or pass tap:fd=N`,
      );
    case EBUSY:
      return because("another program has it open: end that one, or choose another interface");
    case EINVAL:
      if (found && !found.tun?.isTap)
        return because(
          `it is no TAP interface but ${found.tun ? "TUN" : (found.kind ?? "another one")}: choose another name`,
        );
      if (found) return because(`it was made without multi_queue: "ip tuntap del dev ${name} mode tap", then "${add}"`);
      return because("is the name a valid one?");
    case E2BIG:
      return because("an interface has 256 at most, those of other programs included: ask for fewer (queues=N)");
    default:
      return systemError("TUNSETIFF", what, number);
  }
}

function interfaceRequest(name: string, flags: number): Buffer {
  const bytes = Buffer.alloc(IFREQ_SIZE);
  bytes.write(name, 0, IFNAMSIZ - 1);
  bytes.writeUInt16LE(flags, IFREQ_FLAGS);
  return bytes;
}

function nameIn(request: Buffer): string {
  return request.toString("utf8", 0, IFNAMSIZ).replace(/\0.*$/s, "");
}

function errnoIs(number: number | undefined): boolean {
  return koffi.errno() === number;
}
