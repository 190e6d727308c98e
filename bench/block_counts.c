// A plugin of qemu-user: how often each block of translated code ran between two addresses of the program, which must be the
// entries of functions. Arguments: begin=ADDRESS, end=ADDRESS, out=FILE; the file gets a line "address instructions runs" for
// each block. The declarations are those of QEMU's plugin interface that are used here, of any version from 1 on: Debian
// packages no header.
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef PLUGIN_VERSION
#define PLUGIN_VERSION 1
#endif

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_info_t;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb* tb);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*f)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb* tb, void (*f)(unsigned, void*), int flags, void* data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*f)(qemu_plugin_id_t, void*), void* data);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_VERSION;

struct Block {
  uint64_t address, instructions, runs;
  struct Block* next;
};

static struct Block* blocks;
static uint64_t begin, end;
static const char* out;
static bool on;

static void executed(unsigned cpu, void* data) {
  struct Block* const block = data;
  (void)cpu;
  if (block->address == begin) on = true;
  if (block->address == end) on = false;
  block->runs += on;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
  struct Block* const block = calloc(1, sizeof *block);
  (void)id;
  if (!block) return;
  block->address = qemu_plugin_tb_vaddr(tb);
  block->instructions = qemu_plugin_tb_n_insns(tb);
  block->next = blocks;
  blocks = block;
  qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, block);
}

static void finish(qemu_plugin_id_t id, void* data) {
  (void)id;
  (void)data;
  FILE* const file = fopen(out, "w");
  if (!file) return;
  for (const struct Block* b = blocks; b; b = b->next) {
    if (b->runs) fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", b->address, b->instructions, b->runs);
  }
  fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t* info, int argc,
                                                               char** argv) {
  (void)info;
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "begin=", 6) == 0) begin = strtoull(argv[i] + 6, NULL, 16);
    if (strncmp(argv[i], "end=", 4) == 0) end = strtoull(argv[i] + 4, NULL, 16);
    if (strncmp(argv[i], "out=", 4) == 0) out = argv[i] + 4;
  }
  if (!begin || !end || !out) return -1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finish, NULL);
  return 0;
}
