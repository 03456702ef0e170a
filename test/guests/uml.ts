/**
 * A user-mode Linux guest: Debian's unmodified kernel and virtio_net driver as ordinary unprivileged processes,
 * attached to a vhost-user socket by virtio_uml (split ring, one queue pair, memory in one unlinked file).
 */
import { mkdtempSync, statfsSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { AGENT_TERMINAL, buildInitramfs } from "./initramfs.ts";
import { umlModules } from "./kernel.ts";
import { LinuxGuest } from "./linux-guest.ts";
import type { GuestOptions } from "./linux-guest.ts";
import { Program } from "./program.ts";

/** Where the guest's memory file lies: vhost-user memory has to be on tmpfs. */
const memoryDirectory = "/dev/shm";

export class UmlGuest extends LinuxGuest {
  /** Resolves when eth0 is up and the guest takes commands. */
  static boot({ socket, ip, memoryMiB = 128 }: GuestOptions): Promise<UmlGuest> {
    const { bavail, bsize } = statfsSync(memoryDirectory);
    if (bavail * bsize < memoryMiB * 2 ** 20) {
      throw new Error(`${memoryDirectory} has less than ${memoryMiB} MiB free for the guest's memory; enlarge it`);
    }
    const directory = mkdtempSync(join(tmpdir(), "uml-"));
    const program = new Program(
      `guest ${ip}`,
      [
        "linux.uml",
        `mem=${memoryMiB}M`,
        `initrd=${buildInitramfs(umlModules())}`,
        `uml_dir=${directory}/`,
        `virtio_uml.device=${socket}:1`,
        "con=null",
        "con0=null,fd:1",
        "con1=fd:3",
        `${AGENT_TERMINAL}=tty1`,
        "panic=-1",
      ],
      { env: { TMPDIR: memoryDirectory }, channels: 1 },
    );
    return new UmlGuest(ip, program, directory).booted();
  }
}
