// Runs a WebAssembly program that was built for WASI, with this folder's files: node test/wasi.mjs PROGRAM ARGUMENTS...
import { readFile } from 'node:fs/promises'
import { WASI } from 'node:wasi'

const wasi = new WASI({ version: 'preview1', args: process.argv.slice(2), preopens: { '.': '.', '/tmp': '/tmp' } })
const module = await WebAssembly.compile(await readFile(process.argv[2]))
process.exit(wasi.start(await WebAssembly.instantiate(module, wasi.getImportObject())))
