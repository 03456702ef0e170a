/** docs/guides/tap.md: what it tells its reader to type is typed here, by the sections it is in. */
import { readFileSync } from "node:fs";
import { afterEach, describe, expect, test } from "vitest";
import { expectDownload, expectEveryPing, serveFile } from "./guest-traffic.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { missingForNetworks, Network } from "./network.ts";
import type { Program } from "./program.ts";
import { nicProperties, QemuGuest } from "./qemu.ts";
import { UmlGuest } from "./uml.ts";

const missing = missingForNetworks("linux.uml", "qemu-system-x86_64", "a kernel for QEMU", ...INITRAMFS_TOOLS);

const guide = readFileSync(new URL("../../docs/guides/tap.md", import.meta.url), "utf8").replaceAll(
  /^```[^]*?^```/gm,
  "",
);

/** The commands of a section, without prompts: lines that are set in by four, `\` at their ends joins them. */
function commandsOf(section: string): string[] {
  const [, text = ""] = guide.split(new RegExp(`^(?:## |\\*\\*)${section}.*$`, "m"));
  const [part = ""] = text.split(/^(?:## |\*\*)/m);
  const lines = part.replaceAll(/ *\\\n */g, " ").split("\n");
  const commands = lines.filter((line) => line.startsWith("    ")).map((line) => line.trim().replace(/^[#$] /, ""));
  expect(commands, `docs/guides/tap.md has commands under "${section}"`).not.toEqual([]);
  return commands;
}

const one = (commands: readonly string[], what: string): string => {
  const found = commands.filter((command) => command.includes(what));
  expect(found, `one command with "${what}"`).toHaveLength(1);
  return found[0]!;
};

describe.skipIf(missing !== undefined)(`the guide${missing ? `: ${missing}` : ""}`, () => {
  const open = new Set<AsyncDisposable>();

  function keep<T extends AsyncDisposable>(resource: T): T {
    open.add(resource);
    return resource;
  }

  afterEach(async () => {
    for (const resource of [...open].toReversed()) await resource[Symbol.asyncDispose]();
    open.clear();
  });

  /** A command that stays, until the relay that it starts serves. */
  async function startRelay(network: Network, command: string): Promise<Program> {
    const relay = keep(network.start("the guide's relay", ["sh", "-ec", command]));
    await relay.until("how it reaches the interface", () => /is reached by/.test(relay.output) || undefined);
    await network.check("until [ -S /run/vm0.sock ]; do usleep 10000; done");
    return relay;
  }

  test("a VM on the network in five minutes", async () => {
    const network = keep(await Network.make("192.168.77.1"));
    const [makeRelay, ...addresses] = commandsOf("1\\.");
    await startRelay(network, makeRelay!);
    for (const command of addresses) await network.check(command);

    const [qemu, ...inGuest] = commandsOf("2\\.");
    // what is left out, "...", is what any VM has: a disk or a kernel; and what this QEMU needs beside
    const words = qemu!.split(" ").filter((word) => word !== "...");
    expect(words.slice(0, 3)).toEqual(["qemu-system-x86_64", "-machine", "q35"]);
    const device = words.findIndex((word) => word.startsWith("virtio-net-pci"));
    words[device] = [words[device], ...nicProperties()].join(",");
    const guest = keep(
      await QemuGuest.boot({ arguments: words.slice(3), wrap: network.inside, socket: "", ip: "10.0.0.1" }),
    );
    for (const command of inGuest) await guest.check(command.replace("ping", "ping -c 3"));
    await expectEveryPing(guest, network, 1472);
    await expectEveryPing(network, { ip: "192.168.77.2" }, 1472);
    await serveFile(network, 4);
    await expectDownload(network, guest);
  });

  test("a bridge", async () => {
    const network = keep(await Network.make());
    const lan = keep(await Network.make("10.0.0.253"));
    await network.check(`ip link add eth0 type veth peer name eth0 netns ${lan.pid}; ip link set eth0 up`);
    await lan.check(`ip addr add ${lan.ip}/24 dev eth0; ip link set eth0 up`);
    const commands = commandsOf("A bridge");
    const makeRelay = one(commands, "vhost-relay");
    for (const command of commands.filter((each) => each !== makeRelay)) await network.check(command);
    await startRelay(network, makeRelay);
    const guest = keep(await UmlGuest.boot({ socket: `/proc/${network.pid}/root/run/vm0.sock`, ip: "10.0.0.1" }));
    await expectEveryPing(guest, lan, 1472);
    await expectEveryPing(lan, guest, 1472);
    await serveFile(lan, 4);
    await expectDownload(lan, guest);
  });

  test("what the guide does once as root, and the same relay after it", async () => {
    const network = keep(await Network.make());
    for (const command of commandsOf("Without root")) await network.check(command.replace("alice", "nobody"));
    await network.check(`ip addr add ${network.ip}/24 dev vm0`);
    await startRelay(network, one(commandsOf("1\\."), "vhost-relay"));
    const guest = keep(await UmlGuest.boot({ socket: `/proc/${network.pid}/root/run/vm0.sock`, ip: "10.0.0.1" }));
    await expectEveryPing(guest, network, 1472);
    const shown = await network.check(one(commandsOf("Is it well"), "show"));
    expect(shown).toContain("tap:vm0");
  });
});
