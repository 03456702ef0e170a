/**
 * A program started by a test: its output is kept, can be waited for, and is shown when something goes wrong.
 *
 * Each program leads a process group of its own, so that whatever it forked can be killed with it.
 */
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import type { Duplex, Writable } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";

export interface Exit {
  readonly status: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** vitest ends an interrupted or timed-out test process without its clean-up: then the kernel sends SIGTERM. */
const endWithParent = ["--pdeathsig", "TERM", "--"];

/** Only there so that a hung program fails its test with its output instead of hanging the run. */
const patienceMs = 120_000;

export class Program implements AsyncDisposable {
  readonly name: string;
  /** Settles when the program has ended and all its output has been read. */
  readonly exited: Promise<Exit>;
  #child: ChildProcess;
  #output = "";
  #stdout = "";
  #exit: Exit | undefined;

  /**
   * @param command the executable and its arguments; standard input is a pipe
   * @param options.channels how many bidirectional streams to open for it, from file descriptor 3 on (see `channel`)
   */
  constructor(
    name: string,
    command: readonly string[],
    options: { env?: Record<string, string>; channels?: number } = {},
  ) {
    this.name = name;
    this.#child = spawn("setpriv", [...endWithParent, ...command], {
      detached: true,
      env: { ...process.env, ...options.env },
      stdio: Array.from({ length: 3 + (options.channels ?? 0) }, () => "pipe" as const),
    });
    for (const stream of [this.#child.stdout, this.#child.stderr]) {
      stream?.setEncoding("utf8").on("data", (text: string) => (this.#output += text));
    }
    this.#child.stdout?.on("data", (text: string) => (this.#stdout += text));
    // A program may end with our input unread; its exit tells more than EPIPE would.
    this.#child.stdin?.on("error", () => {});
    this.exited = once(this.#child, "close").then(
      ([status, signal]) => (this.#exit = { status, signal }),
      (error: Error) => {
        this.#output += `${error.message}\n`;
        return (this.#exit = { status: null, signal: null });
      },
    );
  }

  /** Everything the program has written to standard output and standard error so far. */
  get output(): string {
    return this.#output;
  }

  /** The part of `output` that went to standard output, so never torn by what went to standard error. */
  get stdout(): string {
    return this.#stdout;
  }

  /** @throws Error if it could not be started */
  get pid(): number {
    if (this.#child.pid === undefined) throw this.failure("was not started");
    return this.#child.pid;
  }

  /** CPU time that all its threads have taken so far, in ticks: 100 a second. */
  get cpuTicks(): number {
    const [utime, stime] = statFields(String(this.pid)).slice(11, 13).map(Number);
    return utime! + stime!;
  }

  get input(): Writable {
    return this.#child.stdin!;
  }

  /** The stream behind its file descriptor `fd`: a unix socket. */
  channel(fd: number): Duplex {
    return this.#child.stdio[fd as 3] as Duplex;
  }

  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  /**
   * Resolves to the first value other than undefined that `probe` returns.
   * @throws Error with the program's output, if the program ends first or the value never comes
   */
  async until<T>(what: string, probe: () => T | undefined): Promise<T> {
    const deadline = Date.now() + patienceMs;
    for (;;) {
      const value = probe();
      if (value !== undefined) return value;
      if (this.#exit !== undefined) throw this.failure(`ended (${describeExit(this.#exit)}) before ${what}`);
      if (Date.now() > deadline) throw this.failure(`runs, but there is still no sign of ${what}`);
      await delay(5);
    }
  }

  failure(problem: string): Error {
    return new Error(`${this.name} ${problem}; its output:\n${this.#output.slice(-8000)}`);
  }

  /** SIGKILL for the program and everything it forked; resolves when no process of them is left. */
  async kill(): Promise<void> {
    const group = this.#child.pid;
    if (group === undefined) return;
    while (groupLives(group)) {
      try {
        process.kill(-group, "SIGKILL");
      } catch (error) {
        // the last of them ended on its own just now
        if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
      }
      await delay(5);
    }
    await this.exited;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill();
  }
}

export function describeExit({ status, signal }: Exit): string {
  return signal === null ? `exit status ${status}` : `signal ${signal}`;
}

/** Whether a process of this group still runs. A zombie does not: it only waits for its parent. */
function groupLives(group: number): boolean {
  return readdirSync("/proc").some((entry) => {
    if (!/^\d+$/.test(entry)) return false;
    const [state, , pgrp] = statFields(entry);
    return Number(pgrp) === group && state !== "Z" && state !== "X";
  });
}

/** The fields of /proc/PID/stat after the command name (proc_pid_stat(5)): state, ppid, pgrp, ... */
function statFields(pid: string): string[] {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
    return stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  } catch {
    return [];
  }
}
