/**
 * AF_UNIX stream sockets that carry file descriptors: socket(2), sendmsg(2), recvmsg(2), unix(7), cmsg(3).
 *
 * Every socket is non-blocking and close-on-exec; so is every received descriptor (MSG_CMSG_CLOEXEC). The caller
 * owns every descriptor returned here. Struct layouts are those of 64-bit Linux with glibc.
 */
import { lstatSync, unlinkSync } from "node:fs";
import koffi from "koffi";
import { ConfigError, SystemError } from "../src/errors.ts";
import { setCloseOnExec, setNonBlocking } from "./fd.ts";
import { check, close, EAGAIN, ECONNREFUSED, EINTR, ENOENT, errno, libc, systemError } from "./libc.ts";

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;
const MSG_CTRUNC = 0x8;
const MSG_NOSIGNAL = 0x4000;
const MSG_CMSG_CLOEXEC = 0x40000000;
const SHUT_RDWR = 2;
const SO_TYPE = 3;
const SO_ACCEPTCONN = 30;
const SO_DOMAIN = 39;
const SUN_PATH_SIZE = 108;

// struct cmsghdr: size_t len, int level, int type; data and the next header aligned to 8
const CMSG_HEADER_SIZE = 16;
const CMSG_LEVEL = 8;
const CMSG_TYPE = 12;
const CMSG_ALIGN = 8;
const FD_SIZE = 4;
const CONTROL_SIZE = 4096;

koffi.struct("iovec", { iov_base: "void *", iov_len: "size_t" });
koffi.struct("msghdr", {
  msg_name: "void *",
  msg_namelen: "uint32_t",
  msg_iov: "iovec *",
  msg_iovlen: "size_t",
  msg_control: "void *",
  msg_controllen: "size_t",
  msg_flags: "int",
});
const socket = libc.func("int socket(int domain, int type, int protocol)");
const socketpairCall = libc.func("int socketpair(int domain, int type, int protocol, _Out_ int *fds)");
const bindCall = libc.func("int bind(int fd, void *address, uint32_t length)");
const listenCall = libc.func("int listen(int fd, int backlog)");
const connectCall = libc.func("int connect(int fd, void *address, uint32_t length)");
const accept4 = libc.func("int accept4(int fd, void *address, void *length, int flags)");
const sendmsg = libc.func("int64_t sendmsg(int fd, msghdr *message, int flags)");
const recvmsg = libc.func("int64_t recvmsg(int fd, _Inout_ msghdr *message, int flags)");
const getsockopt = libc.func("int getsockopt(int fd, int level, int name, _Out_ int *value, _Inout_ uint32_t *length)");
const shutdownCall = libc.func("int shutdown(int fd, int how)");

/**
 * A socket listening on `path`. A socket file that nobody serves any more is replaced.
 * @throws ConfigError when a live server, or a file that is no socket, holds the path; or the path is too long
 */
export function listen(path: string, backlog = 128): number {
  const address = socketAddress(path);
  removeStaleSocket(path);
  const fd = streamSocket();
  try {
    check(bindCall(fd, address, address.length), "bind", `binding socket ${path}`);
    check(listenCall(fd, backlog), "listen", `listening on ${path}`);
  } catch (error) {
    close(fd);
    throw error;
  }
  return fd;
}

/** The next connection, or undefined when none waits. @throws SystemError EMFILE, ENFILE, ENOMEM: wait before retrying */
export function accept(fd: number): number | undefined {
  const connection = accept4(fd, null, null, SOCK_NONBLOCK | SOCK_CLOEXEC) as number;
  return connection < 0 && wouldBlock() ? undefined : check(connection, "accept4", `accepting on fd ${fd}`);
}

/** A socket connected to `path`, or undefined when nobody listens there yet (no file, nobody behind it, queue full). */
export function connect(path: string): number | undefined {
  const address = socketAddress(path);
  const fd = streamSocket();
  if (connectCall(fd, address, address.length) === 0) return fd;
  const error = systemError("connect", `connecting to ${path}`);
  close(fd);
  if ([ENOENT, ECONNREFUSED, EAGAIN].includes(error.errno)) return undefined;
  throw error;
}

/**
 * Takes over a socket that somebody else opened: makes it non-blocking and close-on-exec.
 * Returns whether it listens. @throws ConfigError when the fd is no unix stream socket
 */
export function inherit(fd: number): "listening" | "connected" {
  if (option(fd, SO_DOMAIN) !== AF_UNIX || option(fd, SO_TYPE) !== SOCK_STREAM) {
    throw new ConfigError(`fd ${fd} is no unix stream socket; pass one that listens or is connected`);
  }
  setNonBlocking(fd);
  setCloseOnExec(fd);
  return option(fd, SO_ACCEPTCONN) === 1 ? "listening" : "connected";
}

/** Two connected sockets. */
export function socketpair(): [number, number] {
  const fds = new Int32Array(2);
  check(
    socketpairCall(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds),
    "socketpair",
    "creating a socket pair",
  );
  return [fds[0] as number, fds[1] as number];
}

/** What one recvmsg brought. */
interface Received {
  /** Bytes written to the buffer; 0 when the peer will send no more. */
  count: number;
  /** Descriptors that came along; the caller closes them. */
  fds: number[];
  /** MSG_CTRUNC: descriptors were lost, for example because this process has none left. */
  truncated: boolean;
}

const control = Buffer.alloc(CONTROL_SIZE);

/** Reads what is there, at most `buffer.length` bytes; undefined when there is nothing yet. */
export function receive(fd: number, buffer: Uint8Array): Received | undefined {
  const message = messageHeader(buffer, control);
  const count = Number(recvmsg(fd, message, MSG_CMSG_CLOEXEC));
  if (count < 0 && wouldBlock()) return undefined;
  check(count, "recvmsg", `receiving from fd ${fd}`);
  const fds = receivedFds(control.subarray(0, message.msg_controllen));
  return { count, fds, truncated: (message.msg_flags & MSG_CTRUNC) !== 0 };
}

/**
 * Sends what fits, with `fds` (duplicated by the kernel; still the caller's) attached to the first byte.
 * Returns the number of bytes taken, 0 when the peer's queue is full; the rest must be sent without the fds.
 */
export function send(fd: number, bytes: Uint8Array, fds: readonly number[] = []): number {
  const count = Number(sendmsg(fd, messageHeader(bytes, rights(fds)), MSG_NOSIGNAL));
  return count < 0 && wouldBlock() ? 0 : check(count, "sendmsg", `sending to fd ${fd}`);
}

/** Ends both directions; the peer reads end of file, and whoever waits here wakes. */
export function shutdown(fd: number): void {
  shutdownCall(fd, SHUT_RDWR);
}

function messageHeader(bytes: Uint8Array, controlBytes: Uint8Array) {
  return {
    msg_name: null,
    msg_namelen: 0,
    msg_iov: { iov_base: bytes, iov_len: bytes.length },
    msg_iovlen: 1,
    msg_control: controlBytes,
    msg_controllen: controlBytes.length,
    msg_flags: 0,
  };
}

/** The descriptors of all SCM_RIGHTS control messages; other control messages are ignored. */
function receivedFds(bytes: Buffer): number[] {
  const fds: number[] = [];
  for (let offset = 0; offset + CMSG_HEADER_SIZE <= bytes.length;) {
    const length = Number(bytes.readBigUInt64LE(offset));
    const isRights =
      bytes.readInt32LE(offset + CMSG_LEVEL) === SOL_SOCKET && bytes.readInt32LE(offset + CMSG_TYPE) === SCM_RIGHTS;
    for (let at = CMSG_HEADER_SIZE; isRights && at + FD_SIZE <= length; at += FD_SIZE) {
      fds.push(bytes.readInt32LE(offset + at));
    }
    offset += Math.ceil(Math.max(length, CMSG_HEADER_SIZE) / CMSG_ALIGN) * CMSG_ALIGN;
  }
  return fds;
}

function rights(fds: readonly number[]): Buffer {
  if (fds.length === 0) return Buffer.alloc(0);
  const length = CMSG_HEADER_SIZE + fds.length * FD_SIZE;
  const bytes = Buffer.alloc(Math.ceil(length / CMSG_ALIGN) * CMSG_ALIGN);
  bytes.writeBigUInt64LE(BigInt(length), 0);
  bytes.writeInt32LE(SOL_SOCKET, CMSG_LEVEL);
  bytes.writeInt32LE(SCM_RIGHTS, CMSG_TYPE);
  fds.forEach((fd, index) => bytes.writeInt32LE(fd, CMSG_HEADER_SIZE + index * FD_SIZE));
  return bytes;
}

/** Of a socket; undefined for an fd that is none. */
function option(fd: number, name: number): number | undefined {
  const value = new Int32Array(1);
  return getsockopt(fd, SOL_SOCKET, name, value, [4]) === 0 ? value[0] : undefined;
}

function streamSocket(): number {
  return check(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), "socket", "creating a socket");
}

/** struct sockaddr_un. */
function socketAddress(path: string): Buffer {
  const bytes = Buffer.from(`${path}\0`);
  if (bytes.length > SUN_PATH_SIZE) {
    throw new ConfigError(
      `socket path ${path} is ${bytes.length - 1} bytes long, the limit is 107; use a shorter path`,
    );
  }
  const family = Buffer.alloc(2);
  family.writeUInt16LE(AF_UNIX);
  return Buffer.concat([family, bytes]);
}

/** Removes a socket file that nobody listens on. @throws ConfigError if somebody does, or if it is no socket; SystemError */
export function removeStaleSocket(path: string): void {
  let found;
  try {
    found = lstatSync(path, { throwIfNoEntry: false });
  } catch (error) {
    const { code = "EIO", errno: number = 0 } = error as NodeJS.ErrnoException;
    throw new SystemError("lstat", -number, code, `looking for socket ${path}`);
  }
  if (!found) return;
  if (!found.isSocket()) throw new ConfigError(`${path} exists and is no socket; remove it or choose another path`);
  if (isServed(path))
    throw new ConfigError(`${path} is already served by another process; stop it or choose another path`);
  unlinkSync(path);
}

/** A full queue is a live server too. */
function isServed(path: string): boolean {
  const address = socketAddress(path);
  const fd = streamSocket();
  const served = connectCall(fd, address, address.length) === 0 || errno() === EAGAIN;
  close(fd);
  return served;
}

function wouldBlock(): boolean {
  return errno() === EAGAIN || errno() === EINTR;
}
