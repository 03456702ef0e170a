#!/usr/bin/env node
/**
 * The command line: `vhost-relay run|show|demo`. One file per verb; this one parses and maps errors to exit codes:
 * 0 fine, 1 failure at run time, 2 usage.
 */
import { readFileSync } from "node:fs";
import { findPackageJSON } from "node:module";
import { Command, CommanderError, InvalidArgumentError, Option } from "commander";
import { ConfigError, RelayError } from "../errors.ts";
import { PORT_SYNTAX } from "../ports/spec.ts";

const { version } = JSON.parse(readFileSync(findPackageJSON(import.meta.url) as string, "utf8")) as { version: string };

const program = new Command("vhost-relay")
  .description("A vhost-user back-end whose datapath runs in a WebAssembly sandbox.")
  .version(version)
  .exitOverride()
  .showHelpAfterError("(--help shows what there is)");

program
  .command("run", { isDefault: true })
  .description("serve virtual machines until SIGTERM")
  .addHelpText("after", `\nA port is: ${PORT_SYNTAX}`)
  .option("--link <a=b>", "join two ports; may be given several times", collect, [])
  .option("--socket-path <path>", "serve one VM on this socket (QEMU's convention); with --backend")
  .option("--fd <number>", "the same, on a listening or connected socket that was inherited", fileDescriptor)
  .option("--backend <port>", "what that VM is joined to")
  .addOption(
    new Option("--poll <mode>", "how pollers wait").choices(["adaptive", "busy", "interrupt"]).default("adaptive"),
  )
  .option("--cpus <list>", "pin one poller to each of these CPUs, for example 2,3", cpuList, [])
  .option("--stall-ms <ms>", "how long a frame waits for receive buffers before it is dropped", milliseconds, 1000)
  .option("--control <path>", "control socket (default: one per process, found by show)")
  .option("--print-capabilities", "print what this back-end is, as JSON, and exit")
  .action(async (options) => (await import("./run.ts")).run(options));

program
  .command("show")
  .description("links, their virtual machines and counters of running relays")
  .option("-j, --json", "as JSON")
  .option("-p, --pretty", "as indented JSON")
  .option("--control <path>", "of the relay with this control socket only")
  .action(async (options) => (await import("./show.ts")).show(options));

program
  .command("demo")
  .description("two built-in drivers exchange frames through a relay, every byte checked")
  .option("--seconds <n>", "how long", seconds, 5)
  .option("--forever", "until Ctrl-C")
  .option("--pcap <file>", "replay the frames of this capture as well")
  .action(async (options) => (await import("./demo.ts")).demo(options));

function collect(value: string, earlier: string[]): string[] {
  return [...earlier, value];
}

function cpuList(text: string): number[] {
  if (!/^\d+(,\d+)*$/.test(text)) throw new InvalidArgumentError("write CPU numbers with commas, for example 2,3");
  return text.split(",").map(Number);
}

function fileDescriptor(text: string): number {
  if (!/^\d{1,9}$/.test(text)) throw new InvalidArgumentError("a file descriptor number, for example 3");
  return Number(text);
}

function milliseconds(text: string): number {
  if (!/^\d+$/.test(text) || Number(text) > 3_600_000)
    throw new InvalidArgumentError("a whole number of milliseconds, at most an hour");
  return Number(text);
}

function seconds(text: string): number {
  const value = Number(text);
  if (!(value > 0 && value <= 86_400)) throw new InvalidArgumentError("a number of seconds above 0");
  return value;
}

try {
  // Management software asks for capabilities with whatever other options it would use.
  if (process.argv.includes("--print-capabilities")) process.stdout.write('{"type":"net"}\n');
  else await program.parseAsync();
} catch (error) {
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2;
  else if (error instanceof RelayError) {
    process.stderr.write(`vhost-relay: ${error.message}\n`);
    process.exitCode = error instanceof ConfigError ? 2 : 1;
  } else throw error;
}
