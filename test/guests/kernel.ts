/**
 * The kernels that guests boot, as Debian's packages have installed them, and their modules.
 *
 * user-mode-linux brings its own kernel. QEMU's guests get the newest kernel in /boot, which need not be the one that
 * runs here. It is a bzImage (Linux: Documentation/arch/x86/boot.rst) around an xz-compressed ELF file. QEMU can enter
 * the ELF file at once (PVH), which under TCG saves the seconds that unpacking takes; so it is unpacked here, and kept.
 */
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** Payload of a bzImage: where its header says how many sectors of set-up code there are, and where the payload is. */
const SETUP_SECTS = 0x1f1;
const PAYLOAD_OFFSET = 0x248;
const PAYLOAD_LENGTH = 0x24c;
const SECTOR_SIZE = 512;
/** The uncompressed size, appended to the payload. */
const SIZE_BYTES = 4;

export interface Modules {
  /** Holds modules.dep(5) and the files it names. */
  readonly directory: string;
  /** Those to load, by name; what they depend on is loaded first. */
  readonly load: readonly string[];
  /** Those that a test may load: see LinuxGuest.load(). What the kernel has built in may be among them. */
  readonly carry: readonly string[];
}

export interface Kernel {
  /** What QEMU's -kernel takes. */
  readonly image: string;
  readonly modules: Modules;
}

const carry = ["8021q", "ipv6"];

/** The modules of user-mode Linux, whose program has the kernel in it. @throws Error if they are not there */
export function umlModules(): Modules {
  const releases = "/usr/lib/uml/modules";
  const release = newest(readdirSync(releases));
  if (release === undefined) throw new Error(`no kernel modules in ${releases}; reinstall user-mode-linux`);
  return { directory: join(releases, release), load: ["virtio_net"], carry };
}

/** Debian's kernel for virtual machines, unpacked. @throws Error if none is installed */
export function qemuKernel(): Kernel {
  const release = installedRelease();
  if (release === undefined) throw new Error("no kernel in /boot with modules in /lib/modules");
  return {
    image: unpacked(release),
    modules: { directory: join("/lib/modules", release), load: ["virtio_pci", "virtio_net"], carry },
  };
}

/** Release of the newest kernel that is installed with its modules. */
export function installedRelease(): string | undefined {
  const releases = existsSync("/lib/modules") ? readdirSync("/lib/modules") : [];
  return newest(
    releases.filter((release) => existsSync(vmlinuz(release)) && existsSync(`/lib/modules/${release}/modules.dep`)),
  );
}

function vmlinuz(release: string): string {
  return `/boot/vmlinuz-${release}`;
}

function newest(releases: readonly string[]): string | undefined {
  return releases.toSorted((a, b) => a.localeCompare(b, "en", { numeric: true })).at(-1);
}

function unpacked(release: string): string {
  const source = vmlinuz(release);
  const directory = join(import.meta.dirname, "../../build/guests");
  const image = join(directory, `vmlinux-${release}-${Math.trunc(statSync(source).mtimeMs)}`);
  if (existsSync(image)) return image;
  const bytes = readFileSync(source);
  const start = (bytes.readUInt8(SETUP_SECTS) + 1) * SECTOR_SIZE + bytes.readUInt32LE(PAYLOAD_OFFSET);
  const payload = bytes.subarray(start, start + bytes.readUInt32LE(PAYLOAD_LENGTH) - SIZE_BYTES);
  const { status, stdout } = spawnSync("xz", ["-dc"], { input: payload, maxBuffer: 2 ** 30 });
  if (status !== 0) return source; // another compression, or no xz: it boots too, later
  mkdirSync(directory, { recursive: true });
  const unfinished = `${image}.${process.pid}`;
  writeFileSync(unfinished, stdout);
  renameSync(unfinished, image);
  return image;
}
