/** What a received file descriptor is, and its flags: fcntl(2), pipe(2), proc(5). */
import { readlinkSync, statfsSync } from "node:fs";
import { check, libc } from "./libc.ts";

const O_CLOEXEC = 0o2000000;
const F_SETFD = 2;
const FD_CLOEXEC = 1;
const F_GETFL = 3;
const F_SETFL = 4;
const F_DUPFD_CLOEXEC = 1030;
const O_ACCMODE = 3;
const O_RDONLY = 0;
const O_WRONLY = 1;
const O_RDWR = 2;
const O_NONBLOCK = 0o4000;
const O_PATH = 0o10000000;
const TMPFS_MAGIC = 0x01021994;
const HUGETLBFS_MAGIC = 0x958458f6;

const fcntl = libc.func("int fcntl(int fd, int command, int argument)");
const pipe2 = libc.func("int pipe2(_Out_ int *fds, int flags)");

export type FdKind = "eventfd" | "pipe" | "socket" | "other";

/** Read from the name the kernel gives the fd in /proc. */
export function fdKind(fd: number): FdKind {
  const name = readlinkSync(`/proc/self/fd/${fd}`);
  if (name === "anon_inode:[eventfd]") return "eventfd";
  if (name.startsWith("pipe:[")) return "pipe";
  if (name.startsWith("socket:[")) return "socket";
  return "other";
}

/** Whether write(2) is allowed on it; false for an O_PATH fd. */
export function isWritable(fd: number): boolean {
  const flags = statusFlags(fd);
  return (flags & O_PATH) === 0 && (flags & O_ACCMODE) !== O_RDONLY;
}

/** Whether read(2) is allowed on it; false for an O_PATH fd. */
export function isReadable(fd: number): boolean {
  const flags = statusFlags(fd);
  return (flags & O_PATH) === 0 && (flags & O_ACCMODE) !== O_WRONLY;
}

/** Whether it can be mapped shared and writable. */
export function isReadWrite(fd: number): boolean {
  return (statusFlags(fd) & (O_PATH | O_ACCMODE)) === O_RDWR;
}

/** Whether the file is memory: on tmpfs (a memfd too) or hugetlbfs. A page of any other file may fault for ever. */
export function isMemoryFile(fd: number): boolean {
  const { type } = statfsSync(`/proc/self/fd/${fd}`);
  return type === TMPFS_MAGIC || type === HUGETLBFS_MAGIC;
}

/** Sets O_NONBLOCK on the open file, which whoever sent the fd shares. */
export function setNonBlocking(fd: number): void {
  check(fcntl(fd, F_SETFL, statusFlags(fd) | O_NONBLOCK), "fcntl", `setting O_NONBLOCK on fd ${fd}`);
}

/** Clears O_NONBLOCK: sockets are inherited like that. */
export function setBlocking(fd: number): void {
  check(fcntl(fd, F_SETFL, statusFlags(fd) & ~O_NONBLOCK), "fcntl", `clearing O_NONBLOCK of fd ${fd}`);
}

export function setCloseOnExec(fd: number): void {
  check(fcntl(fd, F_SETFD, FD_CLOEXEC), "fcntl", `setting FD_CLOEXEC on fd ${fd}`);
}

/** A blocking pipe: the read end, the write end. */
export function pipe(): [number, number] {
  const fds = new Int32Array(2);
  check(pipe2(fds, O_CLOEXEC), "pipe2", "creating a pipe");
  return [fds[0] as number, fds[1] as number];
}

/** Another descriptor of the same open file, close-on-exec. */
export function duplicate(fd: number): number {
  return check(fcntl(fd, F_DUPFD_CLOEXEC, 0), "fcntl", `duplicating fd ${fd}`);
}

function statusFlags(fd: number): number {
  return check(fcntl(fd, F_GETFL, 0), "fcntl", `reading the flags of fd ${fd}`);
}
