/**
 * Builds the Linux guests' initramfs from what Debian's packages have installed: busybox, iperf3 and ethtool with their
 * libraries, the kernel's own virtio modules, and an /init that serves commands.
 *
 * The archive format is cpio "newc" (Linux: Documentation/driver-api/early-userspace/buffer-format.rst), written here
 * because that needs neither root for the device node nor a staging directory. The image is kept in build/guests under
 * a name made from its sources' sizes and times, so an updated package or a changed /init makes a new one.
 */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, realpathSync, renameSync, statSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { Modules } from "./kernel.ts";
import { findTool } from "./tools.ts";
import type { Tool } from "./tools.ts";

/** The line the agent writes once it takes commands. */
export const AGENT_READY = "ready";

/** Parameter of the kernel's command line that names the terminal, in /dev, on which the agent listens. */
export const AGENT_TERMINAL = "agent";

/**
 * /init; the kernel gives it the parameters that it does not know itself as variables. The agent reads lines `ID COMMAND` and answers each with one line `ID STATUS OUTPUT`; COMMAND (a shell script that ends at its first failure)
 * and OUTPUT (both streams) are base64, so neither can be mistaken for anything else. Commands run one after the other.
 */
const init = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod "/modules/$module"; done
ip link set lo up
exec 3<>"/dev/$${AGENT_TERMINAL}"
stty raw -echo <&3
echo ${AGENT_READY} >&3
while read -r id command <&3; do
  echo "$command" | base64 -d >/tmp/command
  sh -e /tmp/command >/tmp/output 2>&1 </dev/null 3>&-
  status=$?
  echo "$id $status $(base64 /tmp/output | tr -d '\\n')" >&3
done
poweroff -f
`;

const S_IFDIR = 0o040000;
const S_IFREG = 0o100000;
const S_IFLNK = 0o120000;
const S_IFCHR = 0o020000;

interface Entry {
  readonly path: string;
  readonly mode: number;
  readonly data?: Uint8Array;
  readonly device?: readonly [major: number, minor: number];
}

/** What the guests' kernels and programs come from. */
export const INITRAMFS_TOOLS = ["bash", "busybox", "iperf3", "ethtool"] as const;

/** Returns the path of an initramfs for a kernel with these modules, building it if there is none yet. */
export function buildInitramfs(kernel: Modules): string {
  const files = new Map(INITRAMFS_TOOLS.map((name): [string, string] => [`bin/${name}`, tool(name)]));
  for (const path of [...files.values()].flatMap(sharedLibraries)) files.set(path.slice(1), path);
  const orders = new Map([["order", moduleClosure(kernel.directory, kernel.load)]]);
  for (const module of kernel.carry.filter((name) => !isBuiltIn(kernel.directory, name))) {
    orders.set(`${module}.order`, moduleClosure(kernel.directory, [module]));
  }
  for (const module of [...orders.values()].flat()) files.set(`modules/${basename(module)}`, module);

  const hash = createHash("sha256").update(init + JSON.stringify([...orders]));
  for (const [path, source] of files) {
    const { size, mtimeMs } = statSync(source);
    hash.update(`\n${path} ${source} ${size} ${mtimeMs}`);
  }
  const directory = join(import.meta.dirname, "../../build/guests");
  const image = join(directory, `initramfs-${hash.digest("hex").slice(0, 16)}.cpio`);
  if (existsSync(image)) return image;

  const text = (content: string) => new TextEncoder().encode(content);
  const archive = cpio([
    ...["dev", "proc", "sys", "tmp"].map((path) => ({ path, mode: S_IFDIR | 0o755 })),
    ...directoriesOf([...files.keys()]).map((path) => ({ path, mode: S_IFDIR | 0o755 })),
    { path: "dev/console", mode: S_IFCHR | 0o600, device: [5, 1] },
    { path: "bin/sh", mode: S_IFLNK | 0o777, data: text("busybox") },
    { path: "init", mode: S_IFREG | 0o755, data: text(init) },
    ...[...orders].map(([name, modules]) => ({
      path: `modules/${name}`,
      mode: S_IFREG | 0o644,
      data: text(modules.map((module) => basename(module)).join("\n")),
    })),
    ...[...files].map(([path, source]) => ({
      path,
      mode: S_IFREG | 0o755,
      data: readFileSync(source),
    })),
  ]);
  mkdirSync(directory, { recursive: true });
  // Test files run in processes of their own: the image appears complete or not at all.
  const unfinished = `${image}.${process.pid}`;
  writeFileSync(unfinished, archive);
  renameSync(unfinished, image);
  return image;
}

function tool(name: Tool): string {
  const path = findTool(name);
  if (path === undefined) throw new Error(`cannot build the guests' initramfs: ${name} is not installed`);
  return realpathSync(path);
}

/** The libraries a dynamic executable loads, its interpreter among them. */
function sharedLibraries(executable: string): string[] {
  const { stdout } = spawnSync("ldd", [executable], { encoding: "utf8" }); // it fails for a static one
  return stdout.match(/\/\S+(?= \()/g) ?? [];
}

/** Files of these modules, dependencies first. */
function moduleClosure(directory: string, modules: readonly string[]): string[] {
  // modules.dep(5): `module: dependencies`, the one to load first last
  const lines = readFileSync(join(directory, "modules.dep"), "utf8").split("\n");
  const files = modules.flatMap((module) => {
    const line = lines.find((entry) => entry.split(":")[0]?.endsWith(`/${module}.ko`));
    if (line === undefined) throw new Error(`the kernel of ${directory} has no module ${module}`);
    return line.replace(":", "").trim().split(/\s+/).toReversed();
  });
  return [...new Set(files)].map((path) => join(directory, path));
}

function isBuiltIn(directory: string, module: string): boolean {
  return readFileSync(join(directory, "modules.builtin"), "utf8").includes(`/${module}.ko\n`);
}

/** All directories above these paths, parents first. */
function directoriesOf(paths: readonly string[]): string[] {
  const directories = new Set<string>();
  for (const path of paths) {
    for (let parent = dirname(path); parent !== "."; parent = dirname(parent)) directories.add(parent);
  }
  return [...directories].toSorted();
}

function cpio(entries: readonly Entry[]): Buffer {
  const chunks: Uint8Array[] = [];
  const record = ({ path, mode, data = new Uint8Array(), device = [0, 0] }: Entry, inode: number): void => {
    const name = `${path}\0`;
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    const fields = [inode, mode, 0, 0, 1, 0, data.length, 0, 0, ...device, name.length, 0];
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, "0")).join("")}${name}`;
    chunks.push(Buffer.from(header, "latin1"), padding(header.length), data, padding(data.length));
  };
  entries.forEach((entry, index) => record(entry, index + 1));
  record({ path: "TRAILER!!!", mode: 0 }, 0);
  return Buffer.concat(chunks);
}

/** Zeros up to the next multiple of 4. */
function padding(length: number): Uint8Array {
  return new Uint8Array(-length & 3);
}
