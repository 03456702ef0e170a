/**
 * The part of the WebAssembly JavaScript interface that we use. TypeScript declares it only together with the whole
 * DOM, and without memory64 (`address: "i64"`).
 */
declare namespace WebAssembly {
  interface MemoryDescriptor {
    initial: number | bigint;
    maximum: number | bigint;
    shared: true;
    address?: "i32" | "i64";
  }
  class Memory {
    constructor(descriptor: MemoryDescriptor);
    readonly buffer: SharedArrayBuffer;
    /** Pages; bigint where `address` is "i64". */
    grow(pages: number | bigint): number | bigint;
  }
  class Module {
    constructor(bytes: Uint8Array);
    static imports(module: Module): { module: string; name: string; kind: string }[];
    static exports(module: Module): { name: string; kind: string }[];
  }
  class Instance {
    constructor(module: Module, imports: Record<string, Record<string, Memory | CallableFunction | number>>);
    readonly exports: Record<string, unknown>;
  }
  class RuntimeError extends Error {}
  function compile(bytes: Uint8Array): Promise<Module>;
}
