/**
 * Anonymous files for guest memory: memfd_create(2), seals (fcntl(2)), size.
 *
 * F_SEAL_SHRINK is what keeps a front-end from truncating memory under our loads: a page past the file's end is
 * SIGBUS, which V8 does not catch.
 */
import { ftruncateSync } from "node:fs";
import { check, close, libc } from "./libc.ts";

const MFD_CLOEXEC = 1;
const MFD_ALLOW_SEALING = 2;
const MFD_HUGETLB = 4;
/** The binary logarithm of the size of huge pages goes here. */
const MFD_HUGE_SHIFT = 26;
const F_ADD_SEALS = 1033;
const F_GET_SEALS = 1034;
export const F_SEAL_SEAL = 1;
export const F_SEAL_SHRINK = 2;
export const F_SEAL_GROW = 4;

const memfd_create = libc.func("int memfd_create(const char *name, unsigned int flags)");
const fcntl = libc.func("int fcntl(int fd, int command, int argument)");

/**
 * A sealable memory file of the given size; sparse until touched.
 * @param hugePageBytes makes it of huge pages; its size must be a multiple of theirs. They are taken when it is mapped.
 */
export function memfdCreate(name: string, sizeBytes: number | bigint, hugePageBytes?: number): number {
  const huge = hugePageBytes === undefined ? 0 : MFD_HUGETLB | (Math.log2(hugePageBytes) << MFD_HUGE_SHIFT);
  const flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | huge;
  const fd = check(memfd_create(name, flags), "memfd_create", `creating memory file ${name}`);
  try {
    ftruncateSync(fd, Number(sizeBytes));
  } catch (error) {
    close(fd);
    throw error;
  }
  return fd;
}

/** Adds seals; false where the file cannot be sealed (not a memfd, or sealed against sealing). */
export function addSeals(fd: number, seals: number): boolean {
  return fcntl(fd, F_ADD_SEALS, seals) === 0;
}

/** The file's seals; 0 where it has none or cannot have any. */
export function getSeals(fd: number): number {
  return Math.max(0, fcntl(fd, F_GET_SEALS, 0));
}
