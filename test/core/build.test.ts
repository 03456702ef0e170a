/** Facts about the Wasm that is built: what the sandbox and the memory model rest on, and what makes it fast. */
import { spawnSync } from "node:child_process";
import { cpSync, globSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import binaryen from "binaryen";
import { beforeAll, describe, expect, test } from "vitest";
import { VARIANTS } from "../../src/datapath/variants.ts";
import { SEGMENT_PAGES } from "../../src/layout/lane.ts";

const file = (name: string): string => join(import.meta.dirname, "..", "..", "build", "core", `${name}.wasm`);

/** WebAssembly text, a function each; memories are called by the names they are imported under. */
class CoreText {
  readonly all: string;
  readonly functions: readonly string[];

  constructor(name: string) {
    const module = binaryen.readBinaryWithFeatures(readFileSync(file(name)), binaryen.Features.All);
    const text = module.emitText();
    module.dispose();
    const imports = text.matchAll(/\(import "(\w+)" "(\w+)" \(memory (\S+)/g);
    const names = new Map([...imports].map(([, from, name, label]) => [label, from === "env" ? "$lane" : `$${name}`]));
    this.all = text.replaceAll(/\$mimport\$\d+/g, (label) => names.get(label) ?? label);
    this.functions = this.all.split(/^ \(func /m).slice(1);
  }
}

describe.each(VARIANTS)("the core for %i segments an end", (segments) => {
  let core: CoreText;
  beforeAll(() => {
    core = new CoreText(`core-${segments}`);
  });

  test("imports its lane's memory and the guests' segments, and nothing else; exports the entry points", () => {
    const module = new WebAssembly.Module(readFileSync(file(`core-${segments}`)));
    const numbers = [...Array(segments).keys()];
    expect(WebAssembly.Module.imports(module)).toEqual([
      { module: "env", name: "memory", kind: "memory" },
      ...numbers.map((n) => ({ module: "guest", name: `source${n}`, kind: "memory" })),
      ...numbers.map((n) => ({ module: "guest", name: `destination${n}`, kind: "memory" })),
    ]);
    const names = WebAssembly.Module.exports(module).map(({ name, kind }) => `${kind} ${name}`);
    expect(names.toSorted()).toEqual(
      ["arm", "disarm", "finish", "inject", "poll", "prepare", "refresh"].map((name) => `function ${name}`),
    );
  });

  test("segments are shared memory64s of 16 GiB", () => {
    const memories = core.all.matchAll(/\(import "guest" "\w+" \(memory \S+ i64 1 (\d+) shared\)\)/g);
    expect([...memories].map(([, pages]) => Number(pages))).toEqual(Array(2 * segments).fill(SEGMENT_PAGES));
  });

  test("BI-343 has no atomic.fence", () => {
    expect(core.all).not.toContain("atomic.fence");
  });

  test("BI-211 rings are published by 16-bit atomic stores; beside them only index loads and packed descriptors are atomic", () => {
    for (let n = 0; n < segments; n++) {
      for (const end of ["source", "destination"]) {
        expect(core.all).toContain(`i32.atomic.store16 $${end}${n}`);
        expect(core.all).toContain(`i32.atomic.load16_u $${end}${n}`);
      }
    }
    const atomics = core.all.matchAll(/\b(i\d\d\.atomic\.\S+|memory\.atomic\.\S+) (\$\w+)/g);
    const known = ["i32.atomic.store16", "i32.atomic.load16_u", "i64.atomic.load", "i64.atomic.store"];
    const others = [...atomics].filter(([, name]) => !known.includes(name!));
    expect(others.map(([text]) => text)).toEqual([]);
  });

  test("guest accesses of more than a byte may be unaligned, but for the atomic ones", () => {
    const plain = core.all.matchAll(
      /\b((?:i32|i64|v128)\.(?:load|store)\S*) (\$(?:source|destination)\d)( offset=\d+)?( align=1)?/g,
    );
    const aligned = [...plain].filter(([, name, , , align]) => !/(load|store)8/.test(name!) && !align);
    expect(aligned.map(([text]) => text)).toEqual([]);
  });

  test("memory never grows and no table makes a call indirect", () => {
    expect(core.all).not.toMatch(/memory\.grow|call_indirect|\(table /);
  });
});

test("with one segment an end no accessor is left: what touches a guest also works on the lane's state, but the copy", () => {
  const core = new CoreText("core-1");
  const isCopy = (text: string) => text.includes("memory.copy $destination0 $source0");
  const touchesGuest = (text: string) => /\$(source|destination)0\b/.test(text);
  const lone = core.functions.filter((text) => touchesGuest(text) && !text.includes(" $lane") && !isCopy(text));
  expect(lone).toEqual([]);
  expect(core.functions.some(isCopy)).toBe(true);
});

test("the hooked core imports the accessors, and memory 0 is all the memory it has", () => {
  const imports = WebAssembly.Module.imports(new WebAssembly.Module(readFileSync(file("core-hooked"))));
  expect(imports.filter(({ kind }) => kind === "memory")).toEqual([{ module: "env", name: "memory", kind: "memory" }]);
  expect(imports.filter(({ kind }) => kind !== "memory").every(({ module }) => module === "guest")).toBe(true);
});

test("the package has the linked cores, and not the hooked one", () => {
  const root = join(import.meta.dirname, "..", "..");
  const { files } = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as { files: string[] };
  const cores = globSync(files, { cwd: root }).filter((name) => name.endsWith(".wasm"));
  expect(cores.toSorted()).toEqual(VARIANTS.map((n) => `build/core/core-${n}.wasm`));
});

test("building again, elsewhere, gives the same bytes", { timeout: 120_000 }, () => {
  const root = join(import.meta.dirname, "..", "..");
  const places = [0, 1].map(() => mkdtempSync(join(tmpdir(), "core-build-")));
  try {
    const built = places.map((directory) => {
      for (const name of [
        "assembly",
        "src/layout",
        "src/datapath/variants.ts",
        "asconfig.json",
        "package.json",
        "package-lock.json",
      ]) {
        cpSync(join(root, name), join(directory, name), { recursive: true });
      }
      symlinkSync(join(root, "node_modules"), join(directory, "node_modules"));
      const { status, stderr } = spawnSync(process.execPath, ["assembly/link/build.ts"], {
        cwd: directory,
        encoding: "utf8",
      });
      expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
      const names = [...VARIANTS.map((n) => `core-${n}.wasm`), "core-hooked.wasm"];
      const output = join(directory, "build", "core");
      expect(readdirSync(output).toSorted()).toEqual(names);
      return names.map((name) => readFileSync(join(output, name)).toString("base64"));
    });
    expect(built[0]).toEqual(built[1]);
  } finally {
    for (const directory of places) rmSync(directory, { recursive: true });
  }
});
