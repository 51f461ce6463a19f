// The view of graphs: the passes, and a graph as a picture or as text.
import {bytes,chunks,el,facts,link,plural,time} from './elements.js';
import {$,ATTRS,BODY,D,LINE,MODULE,NAME,R,T,added,after,arrayOf,before,byLayer,gone,graphAt,inputs,irText,layerOf,namesOf,of,op,outputs,pairs,word} from './ops.js';
import {panes,pictures,reveal} from './panes.js';
import {show,view} from './main.js';
import {callText} from './tables.js';

const differs=f=>!!D.comparison&&D.functions[f].steps.length>1;
// `changes`: beside the graph before. `open` are layers of the text, `opened` boxes of the picture.
export const G={f:0,step:D.functions[0].steps.length-1,changes:differs(0),text:false,open:new Set(),opened:null,picked:null,boxes:new Map()};
function look(f,step,changes){
  Object.assign(G,{f,step,changes,picked:null,opened:null});
  G.open.clear();
}
export function row(f,step,at,kind=''){
  const id=graphAt(f,step)[at],module=word(id,MODULE),line=word(id,LINE),body=word(id,BODY);
  const layer=layerOf(id),tail=module===layer?'':module.startsWith(layer+'.')?module.slice(layer.length+1):module;
  const picked=G.picked&&G.picked.join()===[f,step,at].join();
  const r=el('div',{class:`row ${kind}${picked?' on':''}`,tabindex:-1,'data-nav':true,role:'button',
      'data-op':`${step}.${at}`,onclick:()=>pick(f,step,at)},
    el('span',{class:'code'},before(id),el('span',{class:'op'},word(id,NAME)),after(id),body?' { … }':''),
    el('span',{class:'where'},[tail,line.split(': `')[0]].filter(Boolean).join('  ·  ')));
  return r;
}
function pairRow(f,step,[i,j]){
  const equal=i>=0&&j>=0&&graphAt(f,step-1)[i]===graphAt(f,step)[j];
  const side=(s,at,kind)=>at<0?el('div',{class:'empty'}):row(f,s,at,equal?'same':kind);
  return el('div',{class:'pair'},side(step-1,i,'del'),side(step,j,'ins'));
}
// Runs of equal rows are folded, but for two at each end.
function folded(f,step,rows){
  const now=graphAt(f,step),old=graphAt(f,step-1),items=[];
  for(let at=0;at<rows.length;){
    let end=at;
    const same=r=>r[0]>=0&&r[1]>=0&&old[r[0]]===now[r[1]];
    while(end<rows.length&&same(rows[end]))end++;
    if(end-at>6){
      items.push(rows[at],rows[at+1],rows.slice(at+2,end-2),rows[end-2],rows[end-1]);
      at=end;
    }else if(end>at)while(at<end)items.push(rows[at++]);
    else items.push(rows[at++]);
  }
  return items;
}
function openGroup(name,data,box){
  const{f,step,changes}=G;
  if(!changes)return chunks(box,data.length,n=>row(f,step,data[n]));
  const items=folded(f,step,data.rows);
  return chunks(box,items.length,n=>{
    const item=items[n];
    if(!Array.isArray(item[0]))return pairRow(f,step,item);
    const rest=el('div'),more=el('button',{class:'fold',type:'button','data-nav':true,onclick:()=>{
      more.remove();chunks(rest,item.length,k=>pairRow(f,step,item[k]))}},`… ${plural(item.length,'unchanged op')}`);
    return el('div',{},more,rest);
  });
}
function groupRow(name,data,title){
  const box=el('div',{hidden:true});
  let more=null;
  const head=el('button',{class:'group',type:'button','aria-expanded':'false','data-nav':true,'data-group':name,
    onclick:()=>set(box.hidden)},el('span',{class:'name'},name),...title);
  function set(open){
    if(open&&!more)more=openGroup(name,data,box);
    if(!open){box.replaceChildren();more=null}
    box.hidden=!open;
    head.setAttribute('aria-expanded',open);
    open?G.open.add(name):G.open.delete(name);
  }
  G.boxes.set(name,{set,more:n=>more(n),head,data});
  if(G.open.has(name))set(true);
  return[head,box];
}
function passList(){
  const steps=D.functions[G.f].steps,box=el('div',{class:'passes','aria-label':'Passes'});
  if(steps.length>1)steps.forEach((s,i)=>{
    const quiet=i&&!s.hunks.length;
    const count=i?[el('span',{class:'gone'},`−${gone(s)}`),' ',el('span',{class:'new'},`+${added(s)}`)]:[plural(s.ops,'op')];
    box.append(el('button',{type:'button','data-nav':true,class:quiet?'none':'','aria-current':String(i===G.step),
      title:`${s.stage}, ${plural(s.rewrites,'rewrite')}, ${plural(s.ops,'op')}, ${time(s.seconds)}`,
      onclick:()=>{look(G.f,i,i>0&&!quiet);show('graph')}},
      el('span',{},s.name),el('span',{},...(quiet?['']:count))));
  });
  else{
    for(const p of R.passes)box.append(el('div',{class:p.rewrites?'':'none',title:`${p.stage}, ${plural(p.ops,'op')}`},
      el('span',{},p.name),el('span',{},p.rewrites?plural(p.rewrites,'rewrite'):'')));
    if(D.artifact)box.prepend(el('p',{class:'soft small'},'This artifact stores its last graphs. To see what each pass changed, compile the model with --keep-passes, or explore the model itself.'));
  }
  return box;
}
export function graphView(){
  const fn=D.functions[G.f],step=fn.steps[G.step],tools=el('div',{class:'tools'}),again=()=>show('graph');
  if(D.functions.length>1)tools.append(el('label',{},'Function ',el('select',{onchange:e=>{
    look(+e.target.value,D.functions[+e.target.value].steps.length-1,differs(+e.target.value));again()}},
    ...D.functions.map((x,i)=>el('option',{value:i,selected:i===G.f},x.name)))));
  if(G.step)tools.append(el('label',{},'Show ',el('select',{'aria-label':'Show',onchange:e=>{
    look(G.f,G.step,e.target.value==='1');again()}},
    el('option',{value:1,selected:G.changes},D.comparison?'A and B side by side':`before and after ${step.name}`),
    el('option',{value:0,selected:!G.changes},`the graph ${of} ${step.name}`))));
  tools.append(el('span',{class:'choice',role:'group','aria-label':'As'},...[['Picture',false],['Text',true]].map(([name,text])=>
    el('button',{type:'button','aria-pressed':String(G.text===text),onclick:()=>{G.text=text;again()}},name))));
  const says=step.stage?`Stage ${step.stage}, ${plural(step.rewrites,'rewrite')}, ${plural(step.ops,'op')}.`:`${plural(step.ops,'op')}.`;
  const body=G.text?textOf(fn,tools):pictures(G,tools);
  tools.append(el('span',{class:'soft'},says));
  return[el('div',{class:`graph${fn.steps.length>1||R.passes.length?'':' alone'}`},passList(),el('div',{class:'shown'},tools,...body))];
}
function textOf(fn,tools){
  const list=el('div'),ports=kind=>fn[kind].map(([name,type])=>`${name}: ${type}`).join(', ');
  G.boxes=new Map();
  tools.append(el('button',{class:'link',type:'button',onclick:()=>{
    const boxes=[...G.boxes.values()],open=boxes.some(b=>b.head.getAttribute('aria-expanded')==='false');
    boxes.forEach(b=>b.set(open))}},'Open or close all'));
  if(G.changes){
    let quiet=0;
    for(const[name,data]of pairs(G.f,G.step)){
      if(!data.gone&&!data.added){quiet++;continue}
      list.append(...groupRow(name,data,[el('span',{class:'gone'},`−${data.gone}`),el('span',{class:'new'},`+${data.added}`)]));
    }
    if(quiet)list.append(el('p',{class:'soft small'},`${plural(quiet,'layer')} unchanged.`));
  }else for(const[name,data]of byLayer(G.f,G.step))list.append(...groupRow(name,data,[el('span',{class:'soft small'},plural(data.length,'op'))]));
  return[el('p',{class:'code soft'},`inputs ${ports('inputs')}`),list,el('p',{class:'code soft'},`outputs ${ports('outputs')}`)];
}
// Opens what holds an op, selects the op and scrolls to it.
export function jump(f,step,at){
  look(f,step,false);
  G.picked=[f,step,at];
  if(G.text)G.open.add(layerOf(graphAt(f,step)[at]));
  show('graph');
  if(G.text){
    const box=G.boxes.get(layerOf(graphAt(f,step)[at]));
    box.more(box.data.indexOf(at)+20);
  }
  pick(f,step,at);
  reveal(view.querySelector('.row.on, .box.on'));
}
// The ops before and after a block was recognised.
export function showBlock(name){
  const step=D.functions[0].steps.findIndex(s=>s.name==='recognise-experts');
  look(0,step<0?D.functions[0].steps.length-1:step,step>0);
  G.text=false;
  G.wanted=name;
  show('graph');
  const box=panes.at(-1)?.find(b=>b.path===name&&b.kind==='group');
  reveal(box&&view.querySelector(`.pane:last-child [data-key="${CSS.escape(box.key)}"]`));
}
export function pick(f,step,at){
  G.picked=[f,step,at];
  view.querySelectorAll('.on').forEach(r=>r.classList.remove('on'));
  view.querySelectorAll(`[data-op="${step}.${at}"]`).forEach(r=>r.classList.add('on'));
  panes.forEach(p=>p.markPicked());
  opDetails(f,step,at);
}
// The makers and readers of values, as links to their ops.
function around(f,step){
  const ids=graphAt(f,step),makers=new Map(ids.flatMap((id,n)=>outputs(id).map(([v])=>[v,n])));
  const item=(n,value)=>{
    const shown=outputs(ids[n]).filter(o=>value===undefined||o[0]===value);
    return el('div',{class:'code'},link(shown.map(o=>o[1]).join(', '),()=>jump(f,step,n)),`: ${shown.map(o=>o[2]).join(', ')} = ${word(ids[n],NAME)}`);
  };
  const held=name=>{
    const array=arrayOf(name),count=array&&namesOf(array).length;
    const type=array?`${array.stored}, ${array.format}, ${bytes(array.bytes)}${count>1?` in one array of ${count} weights`:''}`:D.functions[f].inputs.find(p=>p[0]===name)?.[1];
    return el('div',{class:'code'},name,type?`: ${type}`:'');
  };
  const readBy=values=>{
    const readers=[...ids.keys()].filter(n=>inputs(ids[n]).some(i=>values.includes(i)));
    return[el('h3',{},'Read by'),...readers.slice(0,40).map(n=>item(n)),readers.length>40?`and ${readers.length-40} more`:''];
  };
  return{made:v=>makers.has(v)?item(makers.get(v),v):held(T[v]),readBy};
}
// What an arrow carries.
export function valueDetails(f,step,values){
  const{made,readBy}=around(f,step);
  panel(values.map(v=>T[v]).join(', '),...values.flatMap(v=>[el('h3',{},'Made by'),made(v),...readBy([v])]));
}
function opDetails(f,step,at){
  const ids=graphAt(f,step),id=ids[at],steps=D.functions[f].steps,line=word(id,LINE),module=word(id,MODULE);
  let since=step,until=step;
  while(since>0&&graphAt(f,since-1).includes(id))since--;
  while(until<steps.length-1&&graphAt(f,until+1).includes(id))until++;
  const{made,readBy}=around(f,step);
  const[file,code]=line.includes(': `')?[line.slice(0,line.indexOf(': `')),line.slice(line.indexOf(': `')+3,-1)]:[line,''];
  const calls=step===steps.length-1?D.calls.filter(c=>c.function===D.functions[f].name&&c.ops.includes(at)):[];
  const whys=D.declined.filter(d=>d.where&&(module===d.where||module.startsWith(d.where+'.')));
  panel(word(id,NAME),
    facts([['your line',file?[el('code',{id:'line'},file),code?el('pre',{},code):'']:''],['module',module||'(none)'],
      steps.length>1&&['since',steps[since].name],
      until<steps.length-1&&['until',steps[until+1].name],
      ...outputs(id).map(([,name,type])=>['output',`${name}: ${type}`]),
      ['attributes',word(id,ATTRS)]].filter(Boolean)),
    ...(whys.length?[el('h3',{},'Declined here'),...whys.map(d=>el('p',{},el('b',{},d.rule),': ',d.reason))]:[]),
    ...(calls.length?[el('h3',{},'Kernel'),...calls.map(c=>el('div',{},callText(c)))]:[]),
    el('h3',{},'Reads'),...inputs(id).map(made),...readBy(outputs(id).map(([v])=>v)),
    ...(word(id,BODY)?[el('h3',{},'Body'),el('pre',{},word(id,BODY))]:[]),
    el('h3',{},'As text'),el('pre',{},irText(id)));
}
export function panel(title,...content){
  $('details').replaceChildren(el('button',{class:'close',type:'button','aria-label':'Close',onclick:close},'×'),
    el('h2',{class:'code'},title),...content);
  $('details').hidden=false;$('details').scrollTop=0;
  view.querySelector('.box.on,.box:focus')?.scrollIntoView({block:'nearest',inline:'nearest'}); // for the graph is narrower now
}
export function close(){$('details').hidden=true}
